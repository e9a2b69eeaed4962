"""Preference pairs: layouts, references, and the meaning of their scores."""

import tracemalloc
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.data import Record, TextDataset, collate
from fedtune.data.spec import DataSpec
from fedtune.data.tokenization import UNSUPERVISED
from fedtune.evaluation.scoring import compute_unit_scores, evaluate_examples
from fedtune.model.spec import LoraSpec
from fedtune.spec import DataError
from fedtune.tasks.causal_lm import sum_token_losses
from fedtune.tasks.preference import PreferenceSettings, compute_length_controlled_mean
from fedtune.tasks.registry import get_task
from fedtune.tasks.saved import load_task_model, save_task_model
from fedtune.tasks.task_model import TaskModel

from ..builders import set_random_values
from ..data.conftest import (
    CARD,
    CLS,
    IS,
    LOST,
    MY,
    NAME,
    SEP,
    THERE,
    WHERE,
    build_chat,
    encode_turns,
    list_rows,
    make_data_spec,
)
from ..model.conftest import make_trained

PAIRS = get_task("preference")
HIDDEN = UNSUPERVISED


def make_settings(*roles: str, max_length: int = 30, **overrides: Any) -> DataSpec:
    return make_data_spec(*(roles or PAIRS.roles), max_length=max_length, **overrides)


TURNS = make_settings("messages", "chosen", "rejected", chat_template="plain")
WHOLE = make_settings("chosen", "rejected", chat_template="plain")


def make_pair(prompt: str, chosen: str, rejected: str) -> Record:
    return Record({"prompt": prompt, "chosen": chosen, "rejected": rejected}, file="a.jsonl", line=3)


def make_turns(*contents: str, first: str = "user") -> str:
    return encode_turns(build_chat(*contents, first=first))


def make_answer(content: str) -> str:
    return make_turns(content, first="assistant")


def make_chat_pair(chosen: str, rejected: str, **fields: str) -> Record:
    return Record({"chosen": chosen, "rejected": rejected, **fields}, file="a.jsonl", line=3)


def test_chosen_and_rejected_answers_share_one_prompt(leading_tokenizer: Any) -> None:
    record = make_pair("where is my card", "lost", "there my name")
    chosen, rejected = list_rows(PAIRS.tokenize([record], leading_tokenizer, data=make_settings()))
    assert chosen == ([CLS, WHERE, IS, MY, CARD, LOST, SEP], [HIDDEN] * 5 + [LOST, SEP])
    assert rejected == ([CLS, WHERE, IS, MY, CARD, THERE, MY, NAME, SEP], [HIDDEN] * 5 + [THERE, MY, NAME, SEP])


@pytest.mark.parametrize("max_length", [3, 4, 5, 6, 7, 8])
def test_prompt_is_truncated_for_the_longer_answer(
    leading_tokenizer: Any, decoder_tokenizer: Any, max_length: int
) -> None:
    for tokenizer, first_ids in ((leading_tokenizer, [CLS]), (decoder_tokenizer, [])):
        for answers in (("lost", "there my name"), ("there my name", "lost")):
            data = make_settings(max_length=max_length)
            texts = list_rows(PAIRS.tokenize([make_pair("where is my card", *answers)], tokenizer, data=data))
            contexts = []
            for (ids, targets), answer in zip(texts, answers, strict=True):
                supervised = [target for target in targets if target != HIDDEN]
                contexts.append(ids[: len(ids) - len(supervised)])
                assert len(ids) <= max_length
                assert supervised[0] == {"lost": LOST, "there my name": THERE}[answer], "the answer must be kept"
            assert contexts[0] == contexts[1], "both answers must have the same context"
            assert contexts[0][: len(first_ids)] == first_ids
            assert len(contexts[0]) >= 1


def test_prompts_and_conversations_produce_identical_pairs(leading_tokenizer: Any) -> None:
    plain = make_settings(chat_template="plain")
    as_text = PAIRS.tokenize([make_pair("where", "lost", "my card")], leading_tokenizer, data=plain)
    continued = make_chat_pair(make_answer("lost"), make_answer("my card"), messages=make_turns("where"))
    assert list_rows(PAIRS.tokenize([continued], leading_tokenizer, data=TURNS)) == list_rows(as_text)
    shared = make_chat_pair(make_turns("where", "lost"), make_turns("where", "my card"))
    assert list_rows(PAIRS.tokenize([shared], leading_tokenizer, data=WHOLE)) == list_rows(as_text)
    longer = make_chat_pair(make_turns("where", "there", "is", "lost"), make_turns("where", "there", "is", "card"))
    learned = [targets for _, targets in list_rows(PAIRS.tokenize([longer], leading_tokenizer, data=WHOLE))]
    assert [[one for one in targets if one != HIDDEN] for targets in learned] == [[LOST, SEP], [CARD, SEP]], "the last"


@pytest.mark.parametrize(
    ("record", "max_length"),
    [
        *(
            (make_pair("where", "lost", "lost"), 30),
            (make_pair("where", "lost there is my card", "lost there is a place"), 4),
        ),
        *((make_pair("where", "lost", "\ud800"), 30), (make_pair("\ud800", "lost", "card"), 30)),
    ],
    ids=["equal", "equal once truncated", "unencodable answer", "unencodable prompt"],
)
def test_indistinguishable_pairs_have_no_targets(leading_tokenizer: Any, record: Record, max_length: int) -> None:
    data = make_settings(max_length=max_length)
    dataset = PAIRS.tokenize([record], leading_tokenizer, data=data, lenient_within=258)
    assert (dataset.texts, len(dataset)) == (2, 1)
    assert all((targets == HIDDEN).all() for targets in dataset.targets)


@pytest.mark.parametrize(
    ("record", "data", "message"),
    [
        (
            make_chat_pair("lost", make_turns("where", "card")),
            WHOLE,
            "chosen = 'text': must be a list of turns, because data.columns has no prompt",
        ),
        (
            make_chat_pair(make_turns("where", "lost"), make_turns("is", "card")),
            WHOLE,
            "rejected = 'different turns': must match the turns of",
        ),
        (
            make_chat_pair(make_turns("where", "lost"), make_turns("where")),
            WHOLE,
            "rejected = 'user': must end with an assistant turn",
        ),
        (
            make_chat_pair(make_turns("lost"), make_answer("lost"), messages=make_turns("where")),
            TURNS,
            "chosen = 'user': must end with an assistant",
        ),
        (
            make_chat_pair(make_answer("a"), make_answer("b"), messages=make_turns("where", "c")),
            TURNS,
            "chosen, turn 3 = 'assistant': must be us",
        ),
        (
            make_pair("where", make_answer("lost"), "card"),
            make_settings(),
            "chosen = 'a list of turns': must be text, like the prompt",
        ),
    ],
)
def test_malformed_pair_is_unusable_and_named_in_the_error(
    leading_tokenizer: Any, record: Record, data: DataSpec, message: str
) -> None:
    PAIRS.check_data(data)
    assert PAIRS.record_validator(data)(record) is not None
    with pytest.raises(DataError) as raised:
        PAIRS.tokenize([record], leading_tokenizer, data=data)
    assert str(raised.value).startswith(f"a.jsonl:3, {message}")


def test_long_pairs_are_truncated_one_at_a_time(leading_tokenizer: Any) -> None:
    """Before truncation a text may be 64 times its final length, and its tokens are Python objects."""

    def measure_peak(count: int) -> int:
        long = " ".join(["where"] * 1200)
        records = [make_pair(long, long, f"{long} lost") for _ in range(count)]
        tracemalloc.start()
        PAIRS.tokenize(records, leading_tokenizer, data=make_settings(max_length=200))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    measure_peak(1)
    assert measure_peak(24) < 2 * measure_peak(6)


def test_generation_prompt_matches_the_training_prompt(leading_tokenizer: Any) -> None:
    data, records = make_settings(prompt_template="is {prompt}"), [make_pair("where", "lost", "card")]
    prompt = PAIRS.encode_prompt({"prompt": "where"}, leading_tokenizer, data=data).tolist()
    chosen, _ = list_rows(PAIRS.tokenize(records, leading_tokenizer, data=data))
    prompts, references = PAIRS.prompts_and_references(records, leading_tokenizer, data=data)
    assert chosen[0][: len(prompt)] == prompts[0].tolist() == prompt
    assert references == ["lost"]


def make_dummy_pairs(model: TaskModel, count: int = 6) -> TextDataset:
    draws = np.random.default_rng(2)
    ids = model.generate_dummies(draws.integers(3, 12, size=2 * count).tolist(), draws)
    targets = model.task.dummy_targets(ids, spec=model.spec, draws=draws, first=lambda length: length // 2)
    return TextDataset(ids, targets, texts=2)


@pytest.fixture
def model() -> TaskModel:
    return make_trained("random:llama", "preference", texts=2)


@pytest.mark.parametrize("train_a", [True, False])
@pytest.mark.parametrize("layers", [None, (-1,)], ids=["uncached", "cached states"])
def test_reference_ignores_the_adapter_values(layers: tuple[int, ...] | None, train_a: bool) -> None:
    lora = LoraSpec(rank=2, alpha=4.0, layers=layers, train_a=train_a)
    model: TaskModel = make_trained("random:llama", "preference", texts=2, lora=lora)
    batch = collate(make_dummy_pairs(model), range(6), pad_id=0)
    names, before = list(model.trainable()), model.logits(batch)
    model.losses(batch)
    reference = model.reference(batch)
    assert list(model.trainable()) == names
    assert torch.equal(model.logits(batch), before), "the adapters must be enabled again"
    with model.base.disable_adapter(), torch.no_grad():
        scores = model.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.log_softmax(dim=-1)
    for row, targets in enumerate(batch.targets):
        positions = (targets[1:] != HIDDEN).nonzero().flatten()
        expected = scores[row, positions, targets[positions + 1]].sum()
        assert float(reference.flatten()[row]) == pytest.approx(float(expected), rel=1e-5)
    set_random_values(model, 3.0)
    assert torch.equal(model.reference(batch), reference)
    if layers:
        padded = type(batch)(
            batch.input_ids, batch.attention_mask, batch.targets, model.compute_frozen_states(batch), texts=2
        )
        torch.testing.assert_close(model.reference(padded), reference)


def test_untrained_model_has_no_preference(model: TaskModel) -> None:
    set_random_values(model, 0.0)
    figures = evaluate_examples(model, make_dummy_pairs(model), pad_id=0, max_tokens=40)
    scores = model.task.scores(figures, spec=model.spec)
    accuracies = dict.fromkeys(("accuracy", "accuracy_length_controlled"), 0.5)
    margins = dict.fromkeys(("margin", "margin_length_controlled"), 0.0)
    assert scores == pytest.approx(accuracies | margins | {"loss": np.log(2)}, abs=1e-5)


def test_cached_reference_does_not_change_scores(model: TaskModel) -> None:
    dataset, cache = make_dummy_pairs(model), {}
    first = evaluate_examples(model, dataset, pad_id=0, max_tokens=40, kept=cache)
    assert all(batch.reference is not None for batch in cache.values())
    set_random_values(model, 0.7)
    cached = evaluate_examples(model, dataset, pad_id=0, max_tokens=40, kept=cache)
    plain = evaluate_examples(model, dataset, pad_id=0, max_tokens=40)
    np.testing.assert_allclose(cached["margin"], plain["margin"], rtol=1e-5)
    assert not np.allclose(first["margin"], plain["margin"])
    # A unit's score is the model's probability of its preference.
    by_one = evaluate_examples(model, dataset, pad_id=0, max_tokens=1)["margin"]
    np.testing.assert_allclose(compute_unit_scores(model, dataset, pad_id=0), 1 / (1 + np.exp(-by_one)), rtol=1e-5)


def test_per_token_loss_uses_mean_log_probabilities_and_is_saved(tmp_path: Path) -> None:
    settings = [PreferenceSettings(beta=0.5, per_token=on) for on in (False, True)]
    plain, mean = (make_trained("random:llama", "preference", texts=2, task_settings=expected) for expected in settings)
    dataset = make_dummy_pairs(plain)
    lengths = np.array([(targets[1:] != HIDDEN).sum() for targets in dataset.targets]).reshape(-1, 2)
    batch = collate(dataset, range(6), pad_id=0)
    with torch.no_grad():
        expected = torch.stack([-total for total, _ in sum_token_losses(plain, batch)]).view(-1, 2).numpy()
    gains = expected - plain.reference(batch).numpy()
    for model, pair_gains in ((plain, gains), (mean, gains / lengths)):
        margins = evaluate_examples(model, dataset, pad_id=0, max_tokens=10_000)["margin"]
        np.testing.assert_allclose(margins, 0.5 * (pair_gains[:, 0] - pair_gains[:, 1]), rtol=1e-4, atol=1e-5)
    save_task_model(mean, tmp_path / "adapter")
    spec = load_task_model(tmp_path / "adapter").spec
    assert (spec.task_settings, spec.texts) == (settings[1], 2)


def test_rows_without_targets_skip_the_output_layer(model: TaskModel) -> None:
    set_random_values(model, 0.7)
    batch = collate(make_dummy_pairs(model), range(3), pad_id=0, shape=(6, 12))
    assert model.output is not None
    with patch.object(model.output, "scores", wraps=model.output.scores) as scores:
        totals = torch.stack([total for total, _ in sum_token_losses(model, batch)])
    assert (scores.call_count, totals[6:].tolist()) == (6, [0.0] * 6)
    totals[6:].sum().backward()  # type: ignore[no-untyped-call]
    assert all(not target.grad.any() for target in model.trainable().values() if target.grad is not None)
    model.base.to(torch.bfloat16)
    assert {total.dtype for total, _ in sum_token_losses(model, batch)} == {torch.float32}


def test_indistinguishable_pairs_are_not_scored(model: TaskModel) -> None:
    dataset = make_dummy_pairs(model)
    targets = (*dataset.targets[:8], *(np.full_like(one, HIDDEN) for one in dataset.targets[8:]))
    with_nothing = evaluate_examples(model, TextDataset(dataset.input_ids, targets, 2), pad_id=0, max_tokens=1)
    of_four = evaluate_examples(model, dataset.select_examples(range(4)), pad_id=0, max_tokens=1)
    assert model.task.scores(with_nothing, spec=model.spec) == model.task.scores(of_four, spec=model.spec)
    drawn = {name: values[4:] for name, values in with_nothing.items()}
    assert model.task.scores(drawn, spec=model.spec)["accuracy"] == 0.5, "a bootstrap draw must not end the evaluation"
    with pytest.raises(DataError, match="no distinguishable pair"):
        evaluate_examples(model, TextDataset(dataset.input_ids[8:], targets[8:], 2), pad_id=0, max_tokens=1)


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=30))
def test_length_controlled_accuracy_ignores_preference_for_length(longer: list[int]) -> None:
    apart = np.array(longer, dtype=np.float64)
    by_length = (np.sign(apart) + 1) / 2
    for right in (by_length, 1 - by_length):
        assert compute_length_controlled_mean(right, apart, neutral=0.5) == pytest.approx(0.5)
    # A preference based on something else keeps its score.
    right, apart = np.array([1.0, 1.0, 1.0, 0.0, 1.0]), np.array([4.0, 2.0, -1.0, -3.0, 0.0])
    assert compute_length_controlled_mean(np.ones(5), apart, neutral=0.5) == 1.0
    assert compute_length_controlled_mean(right, apart, neutral=0.5) == pytest.approx((4 * (1 + 0.5) / 2 + 1) / 5)
    assert compute_length_controlled_mean(np.ones(3), apart[:2].repeat([1, 2]), neutral=0.5) == 0.5, (
        "records of one kind give no estimate"
    )

from itertools import takewhile
from typing import Any

import numpy as np
import pytest
import torch
from sacrebleu.metrics.bleu import BLEU

from fedtune.data.tokenization import TextDataset
from fedtune.evaluation import generation
from fedtune.evaluation.generation import (
    compute_text_scores,
    compute_text_statistics,
    decode_stream,
    generate_batches,
    group_by_prompt,
    sample_completions,
    stream_tokens,
)
from fedtune.evaluation.spec import EvaluationSpec, WritingSpec
from fedtune.model.base_model import build_tiny_tokenizer
from fedtune.spec import ConfigError, DataError
from fedtune.tasks.task_model import TaskModel

from .conftest import END

ENDS = frozenset({END})


Prompts = list[np.ndarray]


@pytest.fixture
def prompts(completion_texts: TextDataset) -> Prompts:
    return [ids[: (len(ids) + 1) // 2] for ids in completion_texts.input_ids]


def write_without_cache(model: TaskModel, prompt: np.ndarray, num_tokens: int) -> list[int]:
    """Generate text greedily by complete forward passes over one unpadded row."""
    token_ids = torch.as_tensor(prompt, dtype=torch.int64)[None]
    with torch.no_grad():
        for _ in range(num_tokens):
            token_ids = torch.cat([token_ids, model.base(input_ids=token_ids).logits[:, -1].argmax()[None, None]], 1)
    return token_ids[0, len(prompt) :].tolist()


def test_generated_rows_end_at_their_own_end_token(language_model: TaskModel, prompts: Prompts) -> None:
    whole = [write_without_cache(language_model, prompt, 8) for prompt in prompts]
    ends = frozenset({end := whole[0][3], 999})
    written = generation.generate_batch(
        language_model,
        dict(enumerate(prompts)),
        end_ids=ends,
        pad_id=2,
        max_new_tokens=8,
        choose=generation.choose_greedily,
    )
    texts = [list(takewhile(lambda token: token not in ends, row)) for row in written.values()]
    assert texts == [row[: row.index(end)] if end in row else row for row in whole]
    assert len(texts[0]) <= 3
    assert min(map(len, written.values())) < 8, "finished texts must leave their batch"


@pytest.mark.parametrize("guided", [False, True])
def test_sampled_texts_use_independent_random_streams(
    language_model: TaskModel, prompts: Prompts, tokenizer: Any, guided: bool
) -> None:
    own, against = [prompts[0]] * 12, [prompts[1]] * 12 if guided else []

    def draw_texts(max_tokens: int, *, first: int = 0, most: int = 20, seed: int = 1) -> dict[int, str | None]:
        spec = WritingSpec(max_new_tokens=most, temperature=1.5, top_p=0.9, guidance=1.0, seed=seed)
        settings = {"tokenizer": tokenizer, "end_ids": frozenset(range(0, 999, 7)), "spec": spec, "against": against}
        return dict(sample_completions(language_model, own, first=first, max_tokens=max_tokens, **settings))

    texts = draw_texts(10_000)
    assert texts == draw_texts(100)
    assert len(set(texts.values())) > 8
    later = draw_texts(10_000, first=5)
    assert [later[place] for place in range(7)] == [texts[place] for place in range(5, 12)]
    assert texts != draw_texts(10_000, seed=2)
    assert None in draw_texts(10_000, most=1).values(), "an unfinished text must be None"


def compute_next_logits(model: TaskModel, token_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.base(input_ids=torch.tensor([token_ids])).logits[0, -1].double()


@pytest.mark.parametrize("share", [0, 1 / 2])
def test_full_guidance_selects_tokens_least_likely_under_the_other_prompt(
    language_model: TaskModel, prompts: Prompts, tokenizer: Any, share: float
) -> None:
    """Only tokens of the nucleus with total probability 0.9 compete."""
    prompts = prompts[:8]
    against = [*prompts[1:], prompts[0]]
    beginnings = [prompt[: int(share * len(prompt))] for prompt in reversed(prompts)]
    expected, ends = [], frozenset({END, *range(0, 999, 7)})
    for prompt, other, beginning in zip(prompts, against, beginnings, strict=True):
        text: list[int] = beginning.tolist()
        for _ in range(6):
            own, others = (compute_next_logits(language_model, [*start.tolist(), *text]) for start in (prompt, other))
            ordered, order = torch.softmax(own, dim=-1).sort(descending=True)
            nucleus = order[ordered.cumsum(dim=-1) - ordered < 0.9]
            text.append(int(nucleus[(own - others)[nucleus].argmax()]))
            if text[-1] in ends:
                break
        expected.append(tokenizer.decode(text[:-1], skip_special_tokens=True) if text[-1] in ends else None)
    spec = WritingSpec(max_new_tokens=6, temperature=1.0, top_p=0.9, guidance=1e9)
    settings = {"tokenizer": tokenizer, "end_ids": ends, "spec": spec, "first": 0, "max_tokens": 10_000}
    settings |= {"begun": beginnings} if share else {}
    assert any(expected)
    assert dict(sample_completions(language_model, prompts, against=against, **settings)) == dict(enumerate(expected))


def test_guidance_scales_probabilities_by_their_ratio(
    language_model: TaskModel, prompts: Prompts, tokenizer: Any
) -> None:
    prompt, other = prompts[:2]
    own, others = (compute_next_logits(language_model, start.tolist()) for start in (prompt, other))
    lift = own - others
    ends = (lift > lift.median()).nonzero()[:, 0].tolist()

    def compute_expected(guidance: float) -> float:
        return float(torch.softmax((own + guidance * lift) / 2, dim=-1)[ends].sum())

    number, spec = 400, WritingSpec(max_new_tokens=1, temperature=2.0, guidance=1.0)
    settings = {"tokenizer": tokenizer, "end_ids": frozenset(ends), "spec": spec, "first": 0, "max_tokens": 10_000}
    drawn = sample_completions(language_model, [prompt] * number, against=[other] * number, **settings)
    ended = sum(text is not None for _, text in drawn) / number
    deviation = (compute_expected(1.0) * (1 - compute_expected(1.0)) / number) ** 0.5
    assert abs(ended - compute_expected(1.0)) < 4 * deviation
    assert compute_expected(1.0) - compute_expected(0.0) > 8 * deviation, "another rule must be detectable"


@pytest.mark.parametrize("family", ["language_model", "language_model_without_positions"])
@pytest.mark.parametrize("max_tokens", [1, 50, 10_000])
def test_padding_cache_and_batching_do_not_change_texts(
    request: pytest.FixtureRequest, prompts: Prompts, tokenizer: Any, max_tokens: int, family: str
) -> None:
    model, expected = request.getfixturevalue(family), []
    assert len({len(prompt) for prompt in prompts}) > 3
    for prompt in prompts:
        row = write_without_cache(model, prompt, 6)
        row = row[: row.index(2)] if 2 in row else row
        expected.append(tokenizer.decode(row, skip_special_tokens=True))
    settings = {"max_new_tokens": 6, "max_tokens": max_tokens}
    written = sorted(generate_batches(model, prompts, tokenizer=tokenizer, end_ids=ENDS, **settings))
    texts = [text for _, text, _ in written]
    assert texts == expected
    assert sum(text.startswith("w") for text in texts) > 10


def test_bleu_and_rouge_match_manual_calculations() -> None:
    def score_hypotheses(hypotheses: list[str], references: list[list[str]]) -> dict[str, float]:
        return compute_text_scores(compute_text_statistics(hypotheses, references))

    hypotheses = ["the cat is on the mat", "a b c d e"]
    references = [["the cat sat on the mat"], ["z z z z z z z", "a b c d e"]]
    # Matched n-grams of order 1 to 4: 5 of 6, 3 of 5, 1 of 4, 0 of 3 for the first pair; 5 of 5, 4 of 4, 3 of 3, 2 of 2
    # for the second.
    bleu = 100 * (10 / 11 * 7 / 9 * 4 / 7 * 2 / 5) ** 0.25
    # Longest common subsequences: 5 of 6 words in both directions, and all words.
    assert score_hypotheses(hypotheses, references) == pytest.approx({"bleu": bleu, "rouge_l": (5 / 6 + 1) / 2})
    assert score_hypotheses(hypotheses[::-1], references[::-1]) == pytest.approx({"bleu": bleu, "rouge_l": 11 / 12})
    assert score_hypotheses(["a b c d e"], references[1:]) == pytest.approx({"bleu": 100.0, "rouge_l": 1.0})
    assert score_hypotheses([""], references[:1]) == {"bleu": 0.0, "rouge_l": 0.0}
    words = ["the", "a", "cat", "dog", "sat", "ran", "on", "mat", ".", "It's"]
    generator = np.random.default_rng(3)
    texts = [" ".join(generator.choice(words, size=size)) for size in generator.integers(1, 20, size=60)]
    some, firsts, seconds = texts[:20], texts[20:40], texts[40:]
    expected = BLEU().corpus_score(some, [firsts, seconds]).score
    assert 0 < expected < 100
    assert score_hypotheses(some, [list(group) for group in zip(firsts, seconds, strict=True)])[
        "bleu"
    ] == pytest.approx(expected)


def test_repeated_prompt_is_generated_once_with_all_references() -> None:
    rows = [np.array(row, dtype=np.int32) for row in ([5, 6], [5], [5, 6])]
    texts = ["first", "other", "second"]
    prompts, references = group_by_prompt(rows, texts)
    assert references == [["first", "second"], ["other"]]
    assert [ids.tolist() for ids in prompts] == [[5, 6], [5]]
    assert group_by_prompt(rows, texts, rows=1)[1] == [["first", "second"]]
    with pytest.raises(DataError, match="must contain at least one prompt"):
        group_by_prompt([], [])


@pytest.mark.parametrize("family", ["language_model", "language_model_without_positions"])
def test_displayed_text_is_the_greedy_continuation(family: str, prompts: Prompts, request: Any) -> None:
    model = request.getfixturevalue(family)
    for prompt in prompts:
        expected = write_without_cache(model, prompt, 8)
        assert list(stream_tokens(model, prompt, end_ids=(), spec=WritingSpec(max_new_tokens=8))) == expected
        # Any end token stops generation and is excluded.
        ends = {expected[3], expected[6]}
        first = min(expected.index(end) for end in ends)
        assert list(stream_tokens(model, prompt, end_ids=ends, spec=WritingSpec(max_new_tokens=8))) == expected[:first]


def test_generation_ends_at_the_last_position_and_restores_flags(
    language_model: TaskModel, prompts: Prompts, tokenizer: Any
) -> None:
    prompt, flags = np.arange(3, 23, dtype=np.int32), [module.training for module in language_model.modules()]
    written = 0
    for _ in stream_tokens(language_model, prompt, end_ids=(), spec=WritingSpec(max_new_tokens=100)):
        written += 1
        assert torch.is_grad_enabled()
        assert [module.training for module in language_model.modules()] == flags
    assert written == 32 - 20
    lengths = {"max_new_tokens": 30, "max_tokens": 100}
    with pytest.raises(
        ConfigError,
        match=r"^evaluation.max_new_tokens = 30: must be smaller: the longest prompt has 8 of the model's 32 tokens",
    ):
        next(generate_batches(language_model, prompts, tokenizer=tokenizer, end_ids=ENDS, **lengths))
    with torch.no_grad():
        next(iter(language_model.trainable().values())).fill_(float("nan"))
    with pytest.raises(ConfigError, match="its training has diverged"):
        next(stream_tokens(language_model, prompt, end_ids=(), spec=WritingSpec()))


def test_sampled_tokens_repeat_by_seed_and_follow_model_probabilities(language_model: TaskModel) -> None:
    prompt = np.array([5, 6, 7], dtype=np.int32)
    with torch.no_grad():
        logits = language_model.base(input_ids=torch.as_tensor(prompt, dtype=torch.int64)[None]).logits[0, -1].float()

    def draw_tokens(number: int, **changes: float) -> np.ndarray:
        specs = [WritingSpec(max_new_tokens=1, seed=seed, **changes) for seed in range(number)]
        return np.array([next(stream_tokens(language_model, prompt, end_ids=(), spec=spec)) for spec in specs])

    assert (draw_tokens(10, temperature=1.0) == draw_tokens(10, temperature=1.0)).all()
    assert set(draw_tokens(10, temperature=1e-300)) == {int(logits.argmax())}, "a temperature near 0 must be greedy"

    def compute_expected(temperature: float) -> float:
        return float(torch.softmax(logits / temperature, dim=-1) @ logits)

    mean = float(logits.numpy()[draw_tokens(200, temperature=2.0)].mean())
    assert abs(mean - compute_expected(2.0)) < 4 * float(logits.std()) / 200**0.5
    assert compute_expected(1.0) - compute_expected(2.0) > 8 * float(logits.std()) / 200**0.5, (
        "a wrong temperature must be detectable"
    )
    chances = torch.softmax(logits, dim=-1).numpy()
    order = np.argsort(-chances, kind="stable")
    nucleus = order[: int(np.searchsorted(np.cumsum(chances[order]), 0.5)) + 1]
    assert 1 < len(nucleus) < 25
    assert set(draw_tokens(60, temperature=1.0, top_p=0.5)) == set(nucleus.tolist())


@pytest.mark.parametrize(
    "text", ["plain", "  spaces  around  ", "Grüße, 你好 \N{RAINBOW}!", "a\nb\n\n", "\N{RAINBOW}" * 3, ""]
)
def test_streamed_text_parts_are_whole_characters(text: str) -> None:
    tokenizer = build_tiny_tokenizer("random:llama")  # one token per byte
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = list(decode_stream([*ids, tokenizer.eos_token_id], tokenizer))
    assert "".join(parts) == text.strip()
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)
    assert len(parts) == len(text.strip()) - sum(letter.isspace() for letter in text.strip())
    ids = tokenizer("ab\N{RAINBOW}", add_special_tokens=False)["input_ids"]  # the last character is incomplete
    assert list(decode_stream(ids[:-1], tokenizer)) == ["a", "b", "\N{REPLACEMENT CHARACTER}"]
    assert "".join(decode_stream([*ids[:-1], ids[0]], tokenizer)) == "ab\N{REPLACEMENT CHARACTER}a"


INVALID = ("max_new_tokens=0", "max_new_tokens=1000001", "temperature=-1.0", "temperature=nan", "top_p=0.0")


@pytest.mark.parametrize("option", [*INVALID, "guidance=-1", "guidance=1e10", f"seed={2**63}"])
def test_invalid_generation_option_is_named(option: str) -> None:
    key, value = option.split("=")
    with pytest.raises(ConfigError, match=f"^{key} = "):
        WritingSpec(**{key: int(value) if value.isdecimal() else float(value)})
    for size in ("max_tokens", "max_new_tokens", "generation_rows"):
        with pytest.raises(ConfigError, match=f"^{size} = 0: .*at least 1"):
            EvaluationSpec(**{size: 0})

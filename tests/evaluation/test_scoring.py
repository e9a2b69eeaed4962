from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedtune.evaluation.scoring as scoring_module
from fedtune.data.batching import Batch, collate
from fedtune.data.tokenization import TextDataset
from fedtune.evaluation.scoring import (
    compute_unit_scores,
    compute_user_scores,
    enter_evaluation_mode,
    evaluate_examples,
    iter_batches_by_length,
)
from fedtune.model.layers import find_layer_stack
from fedtune.model.spec import LoraSpec
from fedtune.spec import DataError
from fedtune.tasks.measures import macro_f1
from fedtune.tasks.task_model import TaskModel

from .conftest import END, bert_classifier, build_llama, score_model


def list_training_flags(model: torch.nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("fails", [False, True])
def test_scoring_restores_every_training_flag(classifier: TaskModel, fails: bool) -> None:
    before = list_training_flags(classifier)
    assert set(before.values()) == {True, False}, "the model must have modules in both modes, or nothing is tested"
    with suppress(ZeroDivisionError), enter_evaluation_mode(classifier):
        assert not any(list_training_flags(classifier).values())
        assert not torch.is_grad_enabled()
        assert not fails or 1 / 0
    assert list_training_flags(classifier) == before
    assert torch.is_grad_enabled()


def test_model_can_train_after_scoring(language_model: TaskModel, completion_texts: TextDataset) -> None:
    _, batch = next(iter_batches_by_length(completion_texts, pad_id=0, max_tokens=40))
    with enter_evaluation_mode(language_model):
        language_model.losses(batch)
    language_model.losses(batch).sum().backward()
    gradients = [p.grad for name, p in language_model.named_parameters() if "lora_" in name]
    assert gradients
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_batches_contain_every_example_once_within_the_budget(labeled_texts: TextDataset) -> None:
    seen: list[int] = []
    for indices, batch in iter_batches_by_length(labeled_texts, pad_id=0, max_tokens=30):
        assert batch.input_ids.numel() <= 30
        seen.extend(indices.tolist())
    assert sorted(seen) == list(range(len(labeled_texts)))
    assert labeled_texts.lengths[seen].tolist() == sorted(labeled_texts.lengths.tolist())
    empty = TextDataset(input_ids=(), targets=labeled_texts.targets[:0])
    with pytest.raises(DataError, match="at least one example"):
        next(iter_batches_by_length(empty, pad_id=0, max_tokens=30))


@pytest.mark.parametrize("cached", [False, True])
def test_cpu_scoring_uses_small_batches_with_equal_results(
    classifier: TaskModel, labeled_texts: TextDataset, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score_in_batches(most: int) -> tuple[dict[str, Any], list[int]]:
        monkeypatch.setattr(scoring_module, "_MAX_ON_CPU", most)
        cache: scoring_module.KeptBatches | None = {} if cached else None
        with enter_evaluation_mode(classifier):
            batches = scoring_module.iter_batches_with_cache(
                classifier, labeled_texts, pad_id=0, max_tokens=10**6, kept=cache
            )
            sizes = [batch.input_ids.numel() for _, batch in batches]
        return evaluate_examples(classifier, labeled_texts, pad_id=0, max_tokens=10**6, kept=cache), sizes

    (many, one), (few, several) = score_in_batches(10**6), score_in_batches(30)
    assert len(one) == 1
    assert max(several) <= 30
    assert many.keys() == few.keys()
    for name, values in many.items():
        np.testing.assert_allclose(few[name], values, atol=1e-5)


def test_no_module_scores_with_gradients_or_in_training_mode(classifier: TaskModel, labeled_texts: TextDataset) -> None:
    weights = {name: value.clone() for name, value in classifier.state_dict().items()}
    before, seen = list_training_flags(classifier), set[tuple[bool, bool]]()
    for module in classifier.modules():
        module.register_forward_hook(lambda ran, _, __: seen.add((ran.training, torch.is_grad_enabled())))
    scores = score_model(classifier, labeled_texts, pad_id=END, max_tokens=4096)
    assert seen == {(False, False)}
    assert list_training_flags(classifier) == before
    assert all(torch.equal(value, weights[name]) for name, value in classifier.state_dict().items())
    assert all(parameter.grad is None for parameter in classifier.parameters())
    assert all(type(score) is float for score in scores.values())
    kept: dict[int, Batch] = {}
    assert score_model(classifier, labeled_texts, pad_id=END, max_tokens=4096, kept=kept) == scores
    assert [(batch.prefix, batch.reference) for batch in kept.values()] == [(None, None)] * len(kept)
    assert kept, "without frozen layers there are only batches to cache"


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_cached_frozen_layers_run_once_with_equal_scores(request: pytest.FixtureRequest, task: str) -> None:
    last = LoraSpec(rank=2, layers=(-1,))
    model = bert_classifier(lora=last) if task == "classification" else build_llama(last)
    data = request.getfixturevalue("labeled_texts" if task == "classification" else "completion_texts")
    frozen, *_ = find_layer_stack(model.base.get_base_model())[1]
    attention = next(module for name, module in frozen.named_children() if "attention" in name or "attn" in name)
    calls: list[None] = []
    attention.register_forward_hook(lambda *_: calls.append(None))
    kept: dict[int, Batch] = {}
    expected = score_model(model, data, pad_id=END, max_tokens=64)
    ran: list[bool] = []
    for _ in range(3):
        calls.clear()
        assert score_model(model, data, pad_id=END, max_tokens=64, kept=kept) == pytest.approx(expected, rel=1e-6)
        ran.append(bool(calls))
    assert ran == [True, False, False]
    assert len(kept) > 1
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.mul_(2.0)
    again = score_model(model, data, pad_id=END, max_tokens=64, kept=kept)
    assert again == pytest.approx(score_model(model, data, pad_id=END, max_tokens=64), rel=1e-6)
    assert again != pytest.approx(expected, rel=1e-6), "trained layers must be computed anew"


@settings(deadline=None)  # the first example is slow because it imports scikit-learn
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30))
def test_macro_f1_matches_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the reference here")
    truth, predicted = np.array(pairs).T
    expected = metrics.f1_score(truth, predicted, average="macro", labels=range(5), zero_division=0)
    assert macro_f1(truth, predicted, num_labels=5) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("max_tokens", [1, 30, 10_000])
def test_batched_scores_match_single_examples(
    classifier: TaskModel, labeled_texts: TextDataset, max_tokens: int
) -> None:
    scores = score_model(classifier, labeled_texts, pad_id=0, max_tokens=max_tokens)
    predicted, losses = [], []
    with torch.no_grad():
        for index in range(len(labeled_texts)):
            batch = collate(labeled_texts, np.array([index]), pad_id=0)
            predicted.append(int(classifier.logits(batch).argmax()))
            losses.append(float(classifier.losses(batch)))
    truth = np.array(labeled_texts.targets)
    assert list(scores) == ["accuracy", "macro_f1", "loss"]
    assert scores["accuracy"] == np.mean(truth == predicted)
    assert scores["macro_f1"] == macro_f1(truth, np.array(predicted), num_labels=4)
    assert scores["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert compute_unit_scores(classifier, labeled_texts, pad_id=END).tolist() == (truth == predicted).tolist(), (
        "a record's score must be 1 or 0"
    )


def compute_token_losses(model: TaskModel, dataset: TextDataset) -> list[np.ndarray]:
    """Compute each example's supervised token losses from the plain base model, one example at a time."""
    results = []
    for input_ids, target in zip(dataset.input_ids, dataset.targets, strict=True):
        with torch.no_grad():
            logits = model.base(input_ids=torch.as_tensor(input_ids, dtype=torch.int64)[None]).logits[0, :-1]
        shifted = torch.as_tensor(target)[1:]
        losses = torch.nn.functional.cross_entropy(logits, shifted, reduction="none", ignore_index=-100)
        results.append(losses[shifted != -100].double().numpy())
    return results


@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_loss_averages_examples_and_perplexity_averages_tokens(
    language_model: TaskModel, completion_texts: TextDataset, max_tokens: int
) -> None:
    scores = score_model(language_model, completion_texts, pad_id=2, max_tokens=max_tokens)
    losses = compute_token_losses(language_model, completion_texts)
    assert len(losses[-1]) == 0, "the test needs an example without supervised tokens"
    per_example = [row.mean() if len(row) else 0.0 for row in losses]
    assert list(scores) == ["loss", "perplexity"]
    assert scores["loss"] == pytest.approx(np.mean(per_example), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(np.exp(np.concatenate(losses).mean()), rel=1e-4)
    # The score of a text follows its mean loss; without supervised tokens it is 0.
    expected = [np.exp(-loss) if len(row) else 0.0 for loss, row in zip(per_example, losses, strict=True)]
    assert compute_unit_scores(language_model, completion_texts, pad_id=END) == pytest.approx(expected, rel=1e-5)


def test_diverged_model_has_infinite_perplexity(
    language_model: TaskModel, completion_texts: TextDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsupervised = TextDataset(input_ids=completion_texts.input_ids[-1:], targets=completion_texts.targets[-1:])
    with pytest.raises(DataError, match="max_length"):
        score_model(language_model, unsupervised, pad_id=2, max_tokens=100)
    for loss, perplexity in ((1e4, float("inf")), (float("nan"), float("nan"))):
        monkeypatch.setattr(
            language_model, "losses", lambda batch, loss=loss: torch.full((len(batch.input_ids),), loss)
        )
        score = score_model(language_model, completion_texts, pad_id=2, max_tokens=100)["perplexity"]
        assert score == pytest.approx(perplexity, nan_ok=True)


@pytest.mark.parametrize("names", [("classifier", "labeled_texts"), ("language_model", "completion_texts")])
def test_unit_scores_are_bounded_and_batch_invariant(names: tuple[str, str], request: pytest.FixtureRequest) -> None:
    model, dataset = (request.getfixturevalue(name) for name in names)
    score = partial(compute_unit_scores, model, pad_id=END)
    whole = score(dataset)
    assert (whole.shape, whole.dtype) == ((len(dataset),), np.float64)
    assert ((whole >= 0) & (whole <= 1)).all()
    assert len(set(whole.tolist())) > 1, "scores must vary, or nothing is tested"
    for omitted in (0, 7, len(dataset) - 1):
        others = [index for index in range(len(dataset)) if index != omitted]
        assert score(dataset.select_examples(others)).tobytes() == whole[others].tobytes()
    order = np.random.default_rng(3).permutation(len(dataset))
    assert score(dataset.select_examples(order)).tobytes() == whole[order].tobytes()
    assert score(dataset.select_examples([])).shape == (0,)


def test_user_score_is_the_bounded_mean_of_record_scores() -> None:
    users = [np.array([0, 3]), np.array([1]), np.array([2, 4, 5])]
    assert compute_user_scores(np.array([1.0, 0.25, 0.0, 0.5, 1.0, 0.5]), users).tolist() == [0.75, 0.25, 0.5]
    assert compute_user_scores(np.zeros(0), []).shape == (0,)
    # For any number of records and any values: noised_scores adds (score, 1) per unit.
    wild = np.array([np.nan, np.inf, -5.0, 7.0, 1.0])
    users = [np.array([0]), np.array([1, 2, 3, 4])]
    assert compute_user_scores(wild, users).tolist() == [0.0, 0.5]
    for count in (1, 10, 1000):
        (score,) = compute_user_scores(np.full(count, 1e9), [np.arange(count)])
        assert score == 1.0

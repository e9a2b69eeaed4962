from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fedtune.evaluation.scoring as scoring_module
from fedtune.data.tokenise import TextDataset
from fedtune.evaluation.scoring import KeptBatches, batches_by_length, batches_to_score, figures_of, scoring
from fedtune.spec import DataError
from fedtune.tasks import TaskModel


def flags(model: torch.nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def test_scoring_restores_each_training_flag(classifier: TaskModel) -> None:
    before = flags(classifier)
    assert set(before.values()) == {True, False}, "the model has to be of both kinds for this test to mean anything"
    with scoring(classifier):
        assert not any(flags(classifier).values())
        assert not torch.is_grad_enabled()
    assert flags(classifier) == before
    assert torch.is_grad_enabled()


def test_scoring_restores_after_an_error(classifier: TaskModel) -> None:
    before = flags(classifier)
    with pytest.raises(RuntimeError, match="inside"), scoring(classifier):
        raise RuntimeError("inside")
    assert flags(classifier) == before


def test_a_model_trains_after_its_first_forward_pass_was_scored(
    language_model: TaskModel, completions: TextDataset
) -> None:
    _, batch = next(batches_by_length(completions, pad_id=0, max_tokens=40))
    with scoring(language_model):
        language_model.losses(batch)
    language_model.losses(batch).sum().backward()
    gradients = [p.grad for name, p in language_model.named_parameters() if "lora_" in name]
    assert gradients
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_batches_hold_every_example_once_within_the_budget(labelled: TextDataset) -> None:
    seen: list[int] = []
    for indices, batch in batches_by_length(labelled, pad_id=0, max_tokens=30):
        assert batch.input_ids.numel() <= 30
        seen.extend(indices.tolist())
    assert sorted(seen) == list(range(len(labelled)))
    assert labelled.lengths[seen].tolist() == sorted(labelled.lengths.tolist())


@pytest.mark.parametrize("keeps", [False, True])
def test_a_cpu_scores_few_tokens_at_a_time_and_as_it_would_many(
    classifier: TaskModel, labelled: TextDataset, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scored(most: int) -> tuple[dict[str, Any], list[int]]:
        monkeypatch.setattr(scoring_module, "_MOST_ON_CPU", most)
        kept: KeptBatches | None = {} if keeps else None
        with scoring(classifier):
            batches = batches_to_score(classifier, labelled, pad_id=0, max_tokens=10**6, kept=kept)
            sizes = [batch.input_ids.numel() for _, batch in batches]
        return figures_of(classifier, labelled, pad_id=0, max_tokens=10**6, kept=kept), sizes

    (many, one), (few, several) = scored(10**6), scored(30)
    assert len(one) == 1
    assert max(several) <= 30
    assert many.keys() == few.keys()
    for name, values in many.items():
        np.testing.assert_allclose(few[name], values, atol=1e-5)


def test_nothing_to_score_is_a_data_error(labelled: TextDataset) -> None:
    empty = TextDataset(input_ids=(), targets=labelled.targets[:0])
    with pytest.raises(DataError, match="at least one example"):
        next(batches_by_length(empty, pad_id=0, max_tokens=30))

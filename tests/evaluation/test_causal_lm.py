from __future__ import annotations

import numpy as np
import pytest
import torch

from fedtune.data.tokenise import TextDataset
from fedtune.spec import DataError
from fedtune.tasks import TaskModel

from .conftest import scores_of


def token_losses(model: TaskModel, dataset: TextDataset) -> list[np.ndarray]:
    """Each example's supervised token losses, from the plain base model, one example at a time."""
    found = []
    for input_ids, target in zip(dataset.input_ids, dataset.targets, strict=True):
        with torch.no_grad():
            logits = model.base(input_ids=torch.as_tensor(input_ids, dtype=torch.int64)[None]).logits[0, :-1]
        shifted = torch.as_tensor(target)[1:]
        losses = torch.nn.functional.cross_entropy(logits, shifted, reduction="none", ignore_index=-100)
        found.append(losses[shifted != -100].double().numpy())
    return found


@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_loss_weighs_examples_and_perplexity_weighs_tokens(
    language_model: TaskModel, completions: TextDataset, max_tokens: int
) -> None:
    scores = scores_of(language_model, completions, pad_id=2, max_tokens=max_tokens)
    losses = token_losses(language_model, completions)
    assert len(losses[-1]) == 0, "one example without supervised tokens belongs to this test"
    per_example = [row.mean() if len(row) else 0.0 for row in losses]
    assert list(scores) == ["loss", "perplexity"]
    assert scores["loss"] == pytest.approx(np.mean(per_example), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(np.exp(np.concatenate(losses).mean()), rel=1e-4)


def test_data_without_a_supervised_token_is_refused(language_model: TaskModel, completions: TextDataset) -> None:
    unsupervised = TextDataset(input_ids=completions.input_ids[-1:], targets=completions.targets[-1:])
    with pytest.raises(DataError, match="max_length"):
        scores_of(language_model, unsupervised, pad_id=2, max_tokens=100)


def test_a_diverged_model_has_infinite_perplexity(
    language_model: TaskModel, completions: TextDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_model, "losses", lambda batch: torch.full((len(batch.input_ids),), 1e4))
    assert scores_of(language_model, completions, pad_id=2, max_tokens=100)["perplexity"] == float("inf")

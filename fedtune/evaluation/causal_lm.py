"""Loss and perplexity of a causal language model."""

from __future__ import annotations

import math

import numpy as np

from fedtune.data.tokenise import UNSUPERVISED, TextDataset
from fedtune.evaluation.forward import KeptStates, batches_to_score, scoring
from fedtune.model.task import TaskModel
from fedtune.spec import DataError


def evaluate_causal_lm(
    task_model: TaskModel, dataset: TextDataset, *, pad_id: int, max_tokens: int, kept: KeptStates | None = None
) -> dict[str, float]:
    """Score `task_model` on every example of `dataset`.

    The two numbers weigh differently on purpose.  `loss` is what training minimises: each example
    counts once, with the mean over its own supervised tokens (zero when truncation left it none).
    `perplexity` is the usual one of language models: each supervised token counts once, and an
    example without any does not count.

    Returns:
        `loss`: mean over examples of the example's mean loss a token, in nats.
        `perplexity`: exp of the mean loss over all supervised tokens; infinite where that overflows.

    Raises:
        DataError: when `dataset` is empty or holds no token to predict.
    """
    losses, num_tokens = (np.zeros(len(dataset), dtype=np.float64) for _ in range(2))
    batches = batches_to_score(task_model, dataset, pad_id=pad_id, max_tokens=max_tokens, kept=kept)
    with scoring(task_model):
        for indices, batch in batches:
            losses[indices] = task_model.losses(batch).cpu()
            # The first token has no predecessor to be predicted from: the model shifts by one.
            num_tokens[indices] = (batch.targets[:, 1:] != UNSUPERVISED).sum(dim=1).cpu()
    if not num_tokens.any():
        raise DataError(
            "evaluation data", "no token to predict", "needs a completion that data.max_length does not cut off"
        )
    return {"loss": float(np.mean(losses)), "perplexity": _perplexity(float(losses @ num_tokens / num_tokens.sum()))}


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf

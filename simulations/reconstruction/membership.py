"""Which of many candidate records were among the site's: a regression of the update on the candidates' gradients.

The server knows base, adapter and head, so it can compute the gradient of any text that it thinks of.  An update is
about a weighted sum of the gradients of the records that took part; all candidates' weights are estimated at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from site_update import Released

from fedtune.data import Record, collate
from fedtune.data.batching import cut_micro_batches
from fedtune.sites.shared_model import RunModel
from fedtune.training.per_example import record_gradients

_MIN_NOISE = 1e-6


def attacked(names: Sequence[str]) -> list[str]:
    """The tensors looked at: A's gradient is zero while B is."""
    return [name for name in names if "lora_A" not in name]


class Candidates:
    """Candidate records and their gradients at the adapter that the server sends.

    Args:
        shared: the public model.
        records: m of them, with their labels.
    """

    def __init__(self, shared: RunModel, records: Sequence[Mapping[str, str]]) -> None:
        shared.initial_adapter.load_into(shared.model)
        data = shared.tokenize_records([Record(dict(record)) for record in records])
        self.names = attacked(list(shared.model.trainable()))
        self._rows = np.empty((len(records), sum(shared.model.trainable()[n].numel() for n in self.names)), np.float32)
        with record_gradients(shared.model) as gradients:
            for part in cut_micro_batches(np.arange(len(records)), data.lengths, max_tokens=1024):
                each = gradients.compute_gradients(collate(data, part, pad_id=shared.tokenizer.pad_token_id))
                self._rows[part] = torch.cat([each[name].flatten(1) for name in self.names], dim=1).numpy()
        self.norms = np.linalg.norm(self._rows, axis=1)
        self._rows /= self.norms[:, None]
        products = (self._rows @ self._rows.T).astype(np.float64)
        self._values, self._vectors = np.linalg.eigh(products)

    def scores(self, released: Released, *, declared_size: int, prior: float) -> np.ndarray:
        """Estimated weight of each candidate's direction in the update, (m,).

        Args:
            declared_size: of the site.
            prior: share of the candidates that are thought to have taken part.

        The least mean square estimate, given the noise that the plan names.
        """
        update = np.concatenate([released.gradient(name).ravel() for name in self.names])
        plan = released.plan
        total = update * plan.sampling_rate * declared_size
        noise = (plan.noise_multiplier * plan.max_grad_norm) ** 2 * plan.local_steps / prior
        seen = self._rows @ total.astype(np.float32)
        damped = np.maximum(self._values, 0) + max(noise, _MIN_NOISE)
        return self._vectors @ ((self._vectors.T @ seen.astype(np.float64)) / damped)


def auroc(scores: np.ndarray, members: np.ndarray) -> float:
    """Probability that a member scores above a non-member; ties count half."""
    order = np.argsort(scores, kind="stable")
    ranks = np.empty(len(scores))
    ranks[order] = np.arange(1, len(scores) + 1)
    inside = int(members.sum())
    return float((ranks[members].sum() - inside * (inside + 1) / 2) / (inside * (len(scores) - inside)))


def found_at(scores: np.ndarray, members: np.ndarray, false_positive_rate: float) -> float:
    """Share of the members above the score that a share `false_positive_rate` of the non-members reaches."""
    bar = np.quantile(scores[~members], 1 - false_positive_rate)
    return float((scores[members] > bar).mean())

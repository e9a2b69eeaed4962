"""AS-LoRA (Kim et al. 2026, arXiv 2605.05769): in each round, every layer trains only one LoRA factor.

With one factor fixed, the average of the sites' products B A is exact, and noise enters one factor only. The lead
computes a score of each factor, A and B, from the noised updates, and sends the selected factor of each layer to the
sites.

The score is the decrease of the loss predicted by a second-order model, |g|**2 / curvature. In the product B A, the
curvature of a factor is the curvature of the loss in W times the other factor's squared norm, and the curvature in W is
the same for both factors. The lead therefore compares |g_B|**2 / |A|**2 with |g_A|**2 / |B|**2, each minus the
expected squared norm of the noise and smoothed over the rounds in which the factor trained.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from fedtune.spec import check_at_least, check_fraction, spec
from fedtune.training.algorithms.local_algorithm import Arrays, LocalAlgorithm, Requirements, RoundOutcome

_A, _B = ".lora_A.", ".lora_B."
_SGD = "the mean gradient cannot be computed from the updates of other optimizers"
_SMALLEST = 1e-12  # lower limit on a factor's squared norm, because B starts at zero


@spec
class AsLoraSettings:
    """Settings of AS-LoRA.

    Attributes:
        smoothing: the weight of earlier rounds in a factor's score.
        retry_after: the number of rounds without training after which a factor trains again regardless of its score.
    """

    smoothing: float = 0.5
    retry_after: int = 4

    def __post_init__(self) -> None:
        check_fraction("smoothing", self.smoothing, zero=True)
        check_at_least("retry_after", self.retry_after, 2)


class AsLora(LocalAlgorithm):
    """FedAvg that trains one LoRA factor per layer and round."""

    name = "aslora"
    settings = AsLoraSettings
    not_in_sums = "secure aggregation trains all tensors in every round"
    not_with_ranks = "its score compares factors that all sites train"
    requires: ClassVar[Requirements] = {
        "lora.kind": ("lora", "AS-LoRA selects one of the two LoRA factors"),
        "lora.train_a": (True, "AS-LoRA selects one of the two LoRA factors"),
        "lora.alternate": (False, "AS-LoRA selects the factor of each layer by its score"),
        "training.optimizer": ("sgd", _SGD),
        "training.momentum": (0.0, _SGD),
        "training.weight_decay": (0.0, _SGD),
    }

    def initial_arrays(self, adapter: Arrays) -> Arrays:
        layers = len(_list_layers(adapter))
        untried = self.own.retry_after
        # Columns are A and B. B is first, because A has no gradient while B is zero.
        idle = np.tile(np.array([untried, untried + 1], dtype=np.float32), (layers, 1))
        return {"score": np.zeros((layers, 2), dtype=np.float32), "idle": idle}

    def select_sent_arrays(self, arrays: Arrays) -> Arrays:
        score, idle = arrays["score"], arrays["idle"]
        must = idle.max(axis=1) >= self.own.retry_after
        return {"train_a": np.where(must, idle[:, 0] > idle[:, 1], score[:, 0] > score[:, 1]).astype(np.float32)}

    def compute_next_arrays(self, arrays: Arrays, outcome: RoundOutcome) -> Arrays:
        score, idle = arrays["score"].copy(), arrays["idle"] + 1
        for row, layer in enumerate(_list_layers(outcome.adapter)):
            factors = [f"{layer}{part}weight" for part in (_A, _B)]
            column = 0 if factors[0] in outcome.step_sizes else 1
            gradient = outcome.compute_mean_gradient(factors[column]).astype(np.float64)
            energy = max(0.0, float(np.square(gradient).sum()) - gradient.size * outcome.noise**2)
            other = float(np.square(outcome.adapter[factors[1 - column]].astype(np.float64)).sum())
            keep = self.own.smoothing if score[row, column] else 0.0  # the first estimate gets full weight
            score[row, column] = keep * score[row, column] + (1 - keep) * energy / max(other, _SMALLEST)
            idle[row, column] = 0
        return {"score": score, "idle": idle}

    def select_frozen_tensors(self, names: Iterable[str], sent: Arrays) -> frozenset[str]:
        names = list(names)
        rests = {
            layer: _B if train_a > 0.5 else _A
            for layer, train_a in zip(_list_layers(names), sent["train_a"], strict=True)
        }
        return frozenset(name for name in names if any(name.startswith(layer + part) for layer, part in rests.items()))


def _list_layers(names: Iterable[str]) -> list[str]:
    """Return the names of the adapted layers, in a fixed order."""
    return sorted({name.partition(_A)[0] for name in names if _A in name})

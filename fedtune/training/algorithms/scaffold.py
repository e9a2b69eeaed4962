"""SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378), computed from noised gradients.

The use of noised gradients follows DP-SCAFFOLD (Noble et al. 2022, arXiv 2111.09278).

A site steps along its noised gradient, minus its own control variate, plus the control variate of all sites. Its
control variate is the mean of its noised gradients in its last round. Sites do not send control variates: the mean
update shows the lead the difference between the average of these means and the control variate that it sent.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fedtune.training.algorithms.local_algorithm import (
    Arrays,
    LocalAlgorithm,
    NoisedGradient,
    Requirements,
    RoundOutcome,
    SiteRound,
)

_SGD = "the mean gradient cannot be computed from the updates of other optimizers"


class Scaffold(LocalAlgorithm):
    """FedAvg with control variates, which correct the drift of the sites' local steps."""

    name = "scaffold"
    not_in_sums = "the corrections of all sites cancel in a sum"
    not_with_ranks = "the average update of few sites does not show the mean gradient of all"
    requires: ClassVar[Requirements] = {
        "training.optimizer": ("sgd", _SGD),
        "training.momentum": (0.0, _SGD),
        "training.weight_decay": (0.0, _SGD),
    }

    def initial_arrays(self, adapter: Arrays) -> Arrays:
        return {name: np.zeros_like(value) for name, value in adapter.items()}

    def select_sent_arrays(self, arrays: Arrays) -> Arrays:
        return arrays

    def compute_next_arrays(self, arrays: Arrays, outcome: RoundOutcome) -> Arrays:
        """Add the mean change of the participants' control variates, weighted by their fraction of all records.

        With c_i' = mean noised gradient, a site moves by -step_size * (c_i' - c_i + c), so the mean of c_i' - c_i is
        the mean gradient from the average update, minus c.
        """
        share = np.float32(outcome.share)
        trained = {
            name: arrays[name] + share * (outcome.compute_mean_gradient(name) - arrays[name])
            for name in outcome.step_sizes
        }
        return {**arrays, **trained}

    def correct_gradient(self, gradient: NoisedGradient, weights: Arrays, at: SiteRound) -> Arrays:
        corrected = {name: value + at.sent[name] for name, value in gradient.values.items()}
        return {name: value - at.state[name] if name in at.state else value for name, value in corrected.items()}

    def compute_next_state(self, mean: NoisedGradient, at: SiteRound) -> Arrays:
        return {**at.state, **mean.values}

    def bound_gradient(self, noised: float, *, moved: float, sent: float) -> float:
        return 2 * noised + sent  # its own control variate is a mean of noised gradients

"""FedProx (Li et al. 2020, arXiv 1812.06127): a proximal term pulls each site towards the adapter that it received.

The proximal term mu / 2 * |w - w_sent|**2 has the gradient mu * (w - w_sent), which depends on no record. It is added
after clipping and noise, so it does not use up the clip norm, and a step remains post-processing of its noised sum.
"""

from __future__ import annotations

import numpy as np

from fedtune.spec import check_positive, spec
from fedtune.training.algorithms.local_algorithm import Arrays, LocalAlgorithm, NoisedGradient, SiteRound


@spec
class FedProxSettings:
    """Settings of FedProx.

    Attributes:
        mu: the weight of the proximal term. An SGD step with learning rate lr moves a fraction lr * mu of the way back
            to the received adapter, so keep lr * mu below 1.
    """

    mu: float = 0.01

    def __post_init__(self) -> None:
        check_positive("mu", self.mu)


class FedProx(LocalAlgorithm):
    """FedAvg with a proximal term in every local step. The term is zero in the first step of a round."""

    name = "fedprox"
    settings = FedProxSettings
    not_in_sums = "the proximal term is zero in the only local step of a round"
    not_with_ranks = ""

    def correct_gradient(self, gradient: NoisedGradient, weights: Arrays, at: SiteRound) -> Arrays:
        mu = np.float32(self.own.mu)
        return {name: value + mu * (weights[name] - at.adapter[name]) for name, value in gradient.values.items()}

    def bound_gradient(self, noised: float, *, moved: float, sent: float) -> float:
        return noised + float(self.own.mu) * moved

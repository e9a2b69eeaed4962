"""FedAdam (Reddi et al. 2020, arXiv 2003.00295): the lead takes an Adam step along the average update."""

from __future__ import annotations

from collections.abc import Mapping

from fedtune.spec import check_fraction, check_positive, spec
from fedtune.training.algorithms.local_algorithm import LocalAlgorithm


@spec
class FedAdamSettings:
    """Settings of FedAdam.

    Attributes:
        server_learning_rate: the lead's learning rate.
        beta_1: the decay rate of the first moment.
        beta_2: the decay rate of the second moment.
        tau: the degree of adaptivity, added to the root of the second moment.
    """

    server_learning_rate: float = 0.1
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        check_positive("server_learning_rate", self.server_learning_rate)
        check_fraction("beta_1", self.beta_1, zero=True)
        check_fraction("beta_2", self.beta_2, zero=True)
        check_positive("tau", self.tau)


class FedAdam(LocalAlgorithm):
    """FedAvg with Adam as the lead's optimizer."""

    name = "fedadam"
    settings = FedAdamSettings
    not_in_sums = "with secure aggregation, the lead runs the optimizer of `training` instead"

    @property
    def flower_strategy(self) -> tuple[str, Mapping[str, float]]:
        own = self.own
        return "FedAdam", {
            "eta": own.server_learning_rate, "beta_1": own.beta_1, "beta_2": own.beta_2, "tau": own.tau,
        }  # fmt: skip

"""FedAvgM (Hsu et al. 2019, arXiv 1909.06335): the lead takes a momentum step along the average update."""

from __future__ import annotations

from collections.abc import Mapping

from fedtune.spec import check_fraction, check_positive, spec
from fedtune.training.algorithms.local_algorithm import LocalAlgorithm


@spec
class FedAvgMSettings:
    """Settings of FedAvgM.

    Attributes:
        server_learning_rate: the lead's learning rate.
        server_momentum: the lead's momentum.
    """

    server_learning_rate: float = 1.0
    server_momentum: float = 0.0

    def __post_init__(self) -> None:
        check_positive("server_learning_rate", self.server_learning_rate)
        check_fraction("server_momentum", self.server_momentum, zero=True)


class FedAvgM(LocalAlgorithm):
    """FedAvg with momentum at the lead."""

    name = "fedavgm"
    settings = FedAvgMSettings
    not_in_sums = "with secure aggregation, the lead runs the optimizer of `training` instead"

    @property
    def flower_strategy(self) -> tuple[str, Mapping[str, float]]:
        own = self.own
        return "FedAvgM", {"server_learning_rate": own.server_learning_rate, "server_momentum": own.server_momentum}

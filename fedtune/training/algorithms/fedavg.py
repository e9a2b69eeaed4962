"""FedAvg (McMahan et al. 2017, arXiv 1602.05629) and FedMedian, its robust variant."""

from __future__ import annotations

from collections.abc import Mapping

from fedtune.training.algorithms.local_algorithm import LocalAlgorithm


class FedAvg(LocalAlgorithm):
    """The average of the updates, weighted by declared size."""

    name = "fedavg"
    not_in_sums = ""
    not_with_ranks = ""


FEDAVG = FedAvg()


class FedMedian(LocalAlgorithm):
    """The coordinate-wise median of the updates (Yin et al. 2018, arXiv 1803.01498).

    The median is robust to a few bad updates.
    """

    name = "fedmedian"
    not_in_sums = "the median cannot be computed from a sum"
    not_with_ranks = "the median would ignore what few sites train"

    @property
    def flower_strategy(self) -> tuple[str, Mapping[str, float]]:
        return "FedMedian", {}

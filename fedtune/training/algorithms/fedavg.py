"""FedAvg (McMahan et al. 2017, arXiv 1602.05629), and its robust relative: the lead averages, sites only step."""

from __future__ import annotations

from collections.abc import Mapping

from fedtune.training.algorithms.local_algorithm import LocalAlgorithm


class FedAvg(LocalAlgorithm):
    """The average of the updates, weighted by declared size."""

    name = "fedavg"
    not_in_sums = ""


FEDAVG = FedAvg()


class FedMedian(LocalAlgorithm):
    """The median of each value over the updates (Yin et al. 2018, arXiv 1803.01498), which resists a few bad ones."""

    name = "fedmedian"
    not_in_sums = "a sum has no median"

    @property
    def flower_strategy(self) -> tuple[str, Mapping[str, float]]:
        return "FedMedian", {}

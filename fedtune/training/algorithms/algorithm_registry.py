"""Registry of federated algorithms; `fedtune/training/algorithms/local_algorithm.py` explains how to add one."""

from __future__ import annotations

from fedtune.spec import check_one_of
from fedtune.training.algorithms.aslora import AsLora
from fedtune.training.algorithms.fedadam import FedAdam
from fedtune.training.algorithms.fedavg import FedAvg, FedMedian
from fedtune.training.algorithms.fedavgm import FedAvgM
from fedtune.training.algorithms.fedprox import FedProx
from fedtune.training.algorithms.local_algorithm import LocalAlgorithm
from fedtune.training.algorithms.scaffold import Scaffold

_ALL = (FedAvg, FedProx, Scaffold, AsLora, FedAdam, FedAvgM, FedMedian)
ALGORITHMS: dict[str, LocalAlgorithm] = {algorithm.name: algorithm() for algorithm in _ALL}


def get_algorithm(name: str, given: object = None) -> LocalAlgorithm:
    """Return the algorithm with this name and these settings; None selects its default settings.

    Raises:
        ConfigError: for `algorithm`, if the name is unknown, or for one of `algorithm_settings`.
    """
    check_one_of("algorithm", name, ALGORITHMS)
    algorithm = ALGORITHMS[name]
    return algorithm if given is None else algorithm.with_settings(given)

"""Flower's strategies by setting, and their state for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedMedian

from fedtune.federation.spec import FederationSpec
from fedtune.flower.flower_records import ARRAYS, WEIGHT_KEY

Arrays = dict[str, npt.NDArray[np.float32]]


def make_strategy(spec: FederationSpec) -> FedAvg:
    """The strategy that `spec` names, asking every site in every round."""
    # Every site is asked; how many must answer is fedtune's own rule, so that too few is an error and not a wait.
    common: dict[str, Any] = {
        "fraction_evaluate": 0.0,
        "min_train_nodes": len(spec.active),
        "min_available_nodes": len(spec.active),
        "weighted_by_key": WEIGHT_KEY,
        "arrayrecord_key": ARRAYS,
    }
    match spec.strategy:
        case "fedadam":
            return FedAdam(
                **common,
                eta=spec.server_learning_rate,
                beta_1=spec.server_momentum,
                beta_2=spec.server_beta_2,
                tau=spec.server_tau,
            )
        case "fedavgm":
            return FedAvgM(
                **common, server_learning_rate=spec.server_learning_rate, server_momentum=spec.server_momentum
            )
        case "fedmedian":
            return FedMedian(**common)
        case _:
            return FedAvg(**common)


def strategy_state(strategy: FedAvg) -> Arrays:
    """The server optimizer's arrays, under names that `restore_strategy` knows; empty where it has none."""
    if isinstance(strategy, FedAdam) and strategy.m_t is not None and strategy.v_t is not None:
        moments = {"m": strategy.m_t, "v": strategy.v_t}
        return {f"{moment}/{name}": value for moment, values in moments.items() for name, value in values.items()}
    if isinstance(strategy, FedAvgM) and strategy.momentum_vector is not None:
        return {f"momentum/{number:05d}": value for number, value in enumerate(strategy.momentum_vector)}
    return {}


def restore_strategy(strategy: FedAvg, state: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Continue `strategy` from what `strategy_state` returned, whatever it has seen since."""

    def part(moment: str) -> Arrays:
        return {name.removeprefix(moment + "/"): v for name, v in state.items() if name.startswith(moment + "/")}

    if isinstance(strategy, FedAdam):
        strategy.m_t, strategy.v_t = part("m") or None, part("v") or None
    elif isinstance(strategy, FedAvgM):
        strategy.momentum_vector = [value for _, value in sorted(part("momentum").items())] or None
        strategy.current_arrays = None  # the adapter that it had averaged; the next round's is sent anew

"""Flower's strategies by setting: what they make of a round's updates, and their state for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedMedian

from fedtune.federation.arrived import Arrived
from fedtune.federation.spec import FederationSpec
from fedtune.flower.flower_records import ARRAYS, WEIGHT_KEY, from_arrays, weighted
from fedtune.model import Adapter

Arrays = dict[str, npt.NDArray[np.float32]]
_VALUES = "values"
_PIECE_BYTES = 1 << 27
"""Of all sites' values that are averaged at once."""


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


def aggregated(
    strategy: FedAvg, round: int, arrived: Arrived, *, weights: Mapping[str, int], envelopes: Mapping[str, Message]
) -> Adapter:
    """What `strategy` makes of the updates, a piece of them after the other: the same bits as of all at once.

    Mean and median take each value by itself.  A server optimizer, which follows a mean, is given that as one update.

    Args:
        strategy: as `make_strategy` makes it.
        round: from 1.
        arrived: the updates.
        weights: site -> its weight, in the order in which a sum adds them.
        envelopes: site -> the message in which its update came; its content is replaced.
    """
    with_optimizer = isinstance(strategy, FedAdam | FedAvgM)
    take = partial(FedAvg.aggregate_train, strategy) if with_optimizer else strategy.aggregate_train
    flat = np.empty(arrived.num_values, dtype=np.float32)
    step = max(1, _PIECE_BYTES // (4 * len(weights)))
    for start in range(0, len(flat), step):
        piece = flat[start : start + step]
        for site, weight in weights.items():
            values = arrived.values(site, start=start, count=len(piece))
            envelopes[site].content = weighted({_VALUES: values}, weight)
        piece[:] = _arrays(take(round, [envelopes[site] for site in weights]))[_VALUES]
    adapter = arrived.adapter(flat)
    if not with_optimizer:
        return adapter
    (site, weight), *_ = weights.items()
    envelopes[site].content = weighted(adapter.tensors, weight)
    # FedAdam counts in float64; an adapter is float32 everywhere.
    arrays = _arrays(strategy.aggregate_train(round, [envelopes[site]]))
    return Adapter({name: value.astype(np.float32) for name, value in arrays.items()})


def _arrays(outcome: tuple[ArrayRecord | None, MetricRecord | None]) -> Arrays:
    arrays, _ = outcome
    assert arrays is not None, "there is an update"
    return from_arrays(arrays)


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

"""Aggregation of plain updates by Flower's strategies, whose server optimizer state is stored in checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp import strategy as strategies
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM

from fedtune.federation.lead import AggregationResult, Arrays, LeadState
from fedtune.federation.replies import RoundReplies
from fedtune.federation.spec import FederationSpec
from fedtune.federation.update_store import UpdateStore
from fedtune.flower.flower_records import ARRAYS, WEIGHT_KEY, build_weighted_record, from_arrays, to_arrays
from fedtune.model.adapter import Adapter

_VALUES = "values"
_PIECE_BYTES = 1 << 27  # bytes that are aggregated at a time, summed over all sites


class Average:
    """Aggregation rule for plain updates: a Flower strategy with the declared `sizes` of the sites as weights."""

    session = ""
    left_out = ()

    def __init__(self, spec: FederationSpec, sizes: Mapping[str, int]) -> None:
        self._sizes = sizes
        name, arguments = spec.bound_algorithm.flower_strategy
        kind: Callable[..., FedAvg] = getattr(strategies, name)
        self._strategy = kind(**arguments, weighted_by_key=WEIGHT_KEY, arrayrecord_key=ARRAYS)

    def resume(self, state: LeadState) -> LeadState:
        self.restore(state.strategy)
        return state

    def prepare(self) -> tuple[str, ...]:
        return tuple(self._sizes)

    def combine(self, state: LeadState, replies: RoundReplies) -> AggregationResult:
        weights = {site: self._sizes[site] for site in replies.sites}
        adapter = self.average(replies.round, replies.arrived, weights)
        return AggregationResult(adapter, replies.sites, replies.failures, self.state)

    def average(self, round: int, arrived: UpdateStore, weights: Mapping[str, float]) -> Adapter:
        """Aggregate the updates of a round in pieces that fit into memory.

        The result is bit-identical to aggregating all values at once, because mean and median are computed element-wise
        and a server optimizer receives the mean as a single update.  The order of `weights` is the order of summation.
        """
        strategy = self._strategy
        optimizer = strategy if isinstance(strategy, FedAdam | FedAvgM) else None
        take = strategy.aggregate_train if optimizer is None else partial(FedAvg.aggregate_train, strategy)
        flat = np.empty(arrived.sent.num_values, dtype=np.float32)
        step = max(1, _PIECE_BYTES // (4 * len(weights)))
        for start in range(0, len(flat), step):
            piece = flat[start : start + step]
            parts = {site: {_VALUES: arrived.read_values(site, start=start, count=len(piece))} for site in weights}
            updates = [
                Message(build_weighted_record(parts[site], weight), 1, "train") for site, weight in weights.items()
            ]
            piece[:] = _require_arrays(take(round, updates))[_VALUES]
        adapter = arrived.build_adapter(flat)
        if optimizer is None:
            return adapter
        # Flower's own loop sets the current arrays before it sends them.
        if isinstance(optimizer, FedAdam):
            optimizer.current_arrays = dict(arrived.sent.tensors)
        else:
            optimizer.current_arrays = to_arrays(arrived.sent.tensors)
        update = Message(build_weighted_record(adapter.tensors, next(iter(weights.values()))), 1, "train")
        # FedAdam computes in float64, but adapters have dtype float32.
        arrays = _require_arrays(optimizer.aggregate_train(round, [update]))
        return Adapter({name: value.astype(np.float32) for name, value in arrays.items()})

    @property
    def state(self) -> Arrays:
        """The state of the server optimizer, in the format of `restore`; empty for a strategy without state."""
        strategy = self._strategy
        if isinstance(strategy, FedAdam) and strategy.m_t is not None and strategy.v_t is not None:
            moments = {"m": strategy.m_t, "v": strategy.v_t}
            return {f"{moment}/{name}": value for moment, values in moments.items() for name, value in values.items()}
        if isinstance(strategy, FedAvgM) and strategy.momentum_vector is not None:
            return {f"momentum/{number:05d}": value for number, value in enumerate(strategy.momentum_vector)}
        return {}

    def restore(self, strategy: Arrays) -> None:
        """Restore the server optimizer to an earlier `state`."""

        def select_part(moment: str) -> dict[str, npt.NDArray[np.float32]]:
            return {name.removeprefix(moment + "/"): v for name, v in strategy.items() if name.startswith(moment + "/")}

        if isinstance(self._strategy, FedAdam):
            self._strategy.m_t, self._strategy.v_t = select_part("m") or None, select_part("v") or None
        elif isinstance(self._strategy, FedAvgM):
            self._strategy.momentum_vector = [value for _, value in sorted(select_part("momentum").items())] or None


def _require_arrays(outcome: tuple[ArrayRecord | None, MetricRecord | None]) -> Arrays:
    arrays, _ = outcome
    assert arrays is not None, "the strategy returns arrays for a round with updates"
    return from_arrays(arrays)

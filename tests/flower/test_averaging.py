"""Aggregation of updates: weights, order of summation, and optimizer state across a restart."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedtune.federation.protocol import RoundRequest
from fedtune.federation.site_round import TrainingResult
from fedtune.federation.spec import FederationSpec
from fedtune.federation.update_store import UpdateStore
from fedtune.flower.averaging import Average
from fedtune.flower.flower_records import build_weighted_record, from_arrays, to_arrays
from fedtune.model.adapter import Adapter

from .conftest import STEPS

ALGORITHMS = ("fedavg", "fedadam", "fedavgm", "fedmedian")

_SETTINGS: dict[str, dict[str, float] | None] = {
    "fedavg": None,
    "fedadam": {"server_learning_rate": 0.1, "beta_1": 0.5, "beta_2": 0.9, "tau": 0.01},
    "fedavgm": {"server_learning_rate": 0.5, "server_momentum": 0.9},
    "fedmedian": None,
}
# The effect of each algorithm on a mean step d in the first round, computed by hand in float64.
_EXPECTED: dict[str, Callable[[float], float]] = {
    "fedmedian": lambda d: 0.125,  # ignores weights
    "fedavg": lambda d: d,
    "fedavgm": lambda d: 0.5 * d,
    # m = (1 - .5) d, v = (1 - .9) d^2, bias correction for round 1 with Flower's exponent t + 1 = 2.
    "fedadam": lambda d: 0.1 * np.sqrt(1 - 0.9**2) / (1 - 0.5**2) * (0.5 * d) / (np.sqrt(0.1 * d * d) + 0.01),
}


def choose(algorithm: str) -> dict[str, Any]:
    return {"algorithm": algorithm, "algorithm_settings": _SETTINGS[algorithm]}


def measure_move(federation: Any) -> float:
    """Return the change of every adapter value in one round."""
    state = federation.run()
    steps = np.concatenate(
        [(state.adapter.tensors[name] - value).ravel() for name, value in federation.adapter.tensors.items()]
    )
    assert steps.dtype == np.float32
    np.testing.assert_allclose(steps, steps[0], atol=1e-6)
    return float(steps[0])


@pytest.mark.parametrize("algorithm", list(_EXPECTED))
@pytest.mark.parametrize("sizes", [(10, 10, 10), (1, 3, 6), (1000, 1, 1)])
def test_updates_are_weighted_by_declared_sizes(federation: Any, algorithm: str, sizes: tuple[int, ...]) -> None:
    mean = float(np.average(list(STEPS.values()), weights=sizes))
    fed = federation(sizes=sizes, **choose(algorithm))
    assert measure_move(fed) == pytest.approx(_EXPECTED[algorithm](mean), abs=1e-5)


@pytest.mark.by_day("fedavg", "fedmedian")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_reply_order_does_not_change_the_average(federation: Any, tamper: Any, algorithm: str) -> None:
    digests, orders = set(), set[tuple[int, ...]]()
    for order in range(4):

        def shuffle_messages(messages: list[Message], order: int = order) -> list[Message]:
            shuffled = random.Random(order).sample(messages, len(messages))
            orders.add(tuple(message.metadata.src_node_id for message in shuffled))
            return shuffled

        tamper(shuffle_messages)
        fed = federation(sizes=(3, 5, 7), **choose(algorithm), num_rounds=3, folder=str(order))
        digests.add(fed.run().adapter.digest())
    assert len(orders) > 1
    assert len(digests) == 1


@pytest.mark.by_day("fedadam")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_restored_strategy_continues_with_the_same_result(federation: Any, algorithm: str) -> None:
    settings = {**choose(algorithm), "sizes": (3, 5, 7)}
    uninterrupted = federation(num_rounds=3, folder="whole", **settings)
    expected = uninterrupted.run()
    first = federation(num_rounds=3, folder="parts", **settings)
    first.run_until(1)
    second = federation(num_rounds=3, folder="parts", **settings)
    state = second.lead.checkpoints.load()
    assert second.run(state).adapter.digest() == expected.adapter.digest()


def test_momentum_keeps_tensor_order_beyond_ten_tensors() -> None:
    average = Average(FederationSpec(algorithm="fedavgm", algorithm_settings={"server_momentum": 0.5}), {})
    state = {f"momentum/{number:05d}": np.full(1, number, np.float32) for number in range(12)}
    average.restore(state)
    assert list(average.state) == list(state)
    assert [int(value[0]) for value in average.state.values()] == list(range(12))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("piece_bytes", [1, 40, 1 << 27])
def test_piecewise_average_matches_flower_bit_for_bit(
    adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, piece_bytes: int
) -> None:
    monkeypatch.setattr("fedtune.flower.averaging._PIECE_BYTES", piece_bytes)
    draw = np.random.default_rng(3)
    sizes = {"a": 30, "b": 5, "c": 71, "d": 4}
    spec = FederationSpec(num_sites=len(sizes), **choose(algorithm))
    whole, pieces = Average(spec, sizes)._strategy, Average(spec, sizes)
    sent = adapter
    for round in (1, 2):
        updates = {
            site: {name: value + draw.standard_normal(value.shape, np.float32) for name, value in sent.tensors.items()}
            for site in sizes
        }
        whole.current_arrays = dict(sent.tensors) if algorithm == "fedadam" else to_arrays(sent.tensors)
        replies = [Message(build_weighted_record(updates[site], size), 1, "train") for site, size in sizes.items()]
        arrays, _ = whole.aggregate_train(round, replies)
        expected = {name: value.astype(np.float32) for name, value in from_arrays(arrays).items()}
        with UpdateStore(tmp_path / "arrived", sent) as arrived:
            for site in reversed(sizes):
                arrived.put(site, updates[site])
            sent = pieces.average(round, arrived, sizes)
        for name, value in expected.items():
            assert value.tobytes() == sent.tensors[name].tobytes(), name


def test_update_is_stored_on_disk_before_the_next_site_trains(federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fed = federation(sizes=(3, 5, 7))
    there: list[list[str]] = []
    train = fed._train

    def spy(request: RoundRequest, adapter: Adapter, attempt: int) -> TrainingResult:
        there.append(sorted(path.name for path in fed.lead.checkpoints.updates_folder.iterdir()))
        return train(request, adapter, attempt)

    monkeypatch.setattr(fed, "_train", spy)
    fed.run()
    sites = list(fed.sizes)
    assert there[: len(sites)] == [sites[:number] for number in range(len(sites))]
    assert not fed.lead.checkpoints.updates_folder.exists()

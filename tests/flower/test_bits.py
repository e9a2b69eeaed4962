"""Rounds whose adapters and updates travel in few bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedtune.federation.protocol import Brought, RoundRequest
from fedtune.federation.site_round import Trained
from fedtune.flower import flower_records
from fedtune.flower.server_app import run_rounds
from fedtune.flower.simulation import InProcessGrid
from fedtune.model import Adapter
from fedtune.privacy.few_bits import Difference, most_level
from fedtune.privacy.ledger.chain import Kind

from .conftest import STEPS


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Brought]]:
    """Node and adapter of every request for training, as they are sent."""
    found: list[tuple[int, Brought]] = []
    push = InProcessGrid.push_messages

    def noted(self: InProcessGrid, messages: Any) -> list[str]:
        given = list(messages)
        for message in given:
            if message.metadata.message_type == "train":
                found.append((message.metadata.dst_node_id, flower_records.to_brought(message.content)))
        return push(self, given)

    monkeypatch.setattr(InProcessGrid, "push_messages", noted)
    return found


def moving(made: Any) -> list[tuple[Adapter, Difference]]:
    """Let sites move each value differently; what each began in, and what it answers."""
    moves: list[tuple[Adapter, Difference]] = []

    def train(request: RoundRequest, adapter: Adapter, attempt: int) -> Trained:
        draws = np.random.default_rng([len(moves), attempt])
        end = {n: v + draws.normal(0, 0.1, v.shape).astype(np.float32) for n, v in adapter.tensors.items()}
        answered = Difference.between(
            adapter.tensors, end, bits=made.spec.bits, about=f"{request.site} {request.round}"
        )
        moves.append((adapter, answered))
        return Trained(adapter=Adapter(end))

    made._train = train
    return moves


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_on_the_way_to_the_sites_stays_out_of_the_average(federation: Callable[..., Any], bits: int) -> None:
    made = federation(num_rounds=3, bits=bits, sizes=(10, 20, 10))
    moves = moving(made)
    run_rounds(made.grid, made.lead, made.start)
    before = made.adapter
    for number, state in enumerate(made.finished):
        (begun, *same), answered = zip(*moves[3 * number : 3 * number + 3], strict=True)
        assert {start.digest() for start in same} == {begun.digest()}, "every site begins alike"
        ends = [difference.added_to(before.tensors) for difference in answered]
        for name, value in state.adapter.tensors.items():
            exact = np.average([end[name] for end in ends], axis=0, weights=[1, 2, 1])
            np.testing.assert_allclose(value, exact, rtol=0, atol=1e-6)
            off = np.abs(begun.tensors[name] - before.tensors[name]).max()
            step = np.abs(before.tensors[name] - made.adapter.tensors[name]).max() / most_level(bits)
            assert 1e-5 < off < 1.001 * step if number else off == 0, "at first nothing is to be added to the reference"
        before = state.adapter


def test_the_reference_travels_once(federation: Callable[..., Any], asked: list[tuple[int, Brought]]) -> None:
    large = Adapter({"head": np.zeros(5000, np.float32)})
    made = federation(num_rounds=3, bits=8, adapter=large)
    state = run_rounds(made.grid, made.lead, made.start)
    assert [brought.adapter is not None for _, brought in asked] == [True] * 3 + [False] * 6
    assert {brought.adapter.digest() for _, brought in asked[:3] if brought.adapter} == {made.adapter.digest()}
    assert all(isinstance(brought.difference, Difference) for _, brought in asked)
    other = federation(num_rounds=2, adapter=large, folder="whole")
    whole = run_rounds(other.grid, other.lead, other.start)
    for few, all_bits in (
        (state.rounds[1].bytes_down, whole.rounds[1].bytes_down),
        (state.rounds[1].bytes_up, whole.rounds[1].bytes_up),
    ):
        assert all_bits - few == pytest.approx(3 * 3 * 5000, abs=1000), "three of four bytes a value, at three sites"


def test_a_site_that_lost_the_reference_pays_nothing_and_gets_it_again(
    federation: Callable[..., Any], asked: list[tuple[int, Brought]]
) -> None:
    made = federation(num_rounds=4, bits=8)

    def lose(state: Any) -> None:
        made.finished.append(state)
        if state.round == 1:
            made.reference_of("site-2").unlink()

    state = run_rounds(made.grid, replace(made.lead, finished=lose), made.start)
    assert [result.failed_sites for result in state.rounds] == [{}, {"site-2": "reference_missing"}, {}, {}]
    reserved = [event for event in made.events("site-2") if event.kind is Kind.RESERVE]
    assert [event.round for event in reserved] == [1, 3, 4]
    assert [brought.adapter is not None for _, brought in asked[6:9]] == [False, True, False]


def test_a_lead_that_starts_again_sends_the_reference_again(
    federation: Callable[..., Any], asked: list[tuple[int, Brought]]
) -> None:
    made, other = (federation(num_rounds=3, bits=8, folder=name) for name in "ab")
    whole = run_rounds(made.grid, made.lead, made.start)
    asked.clear()
    state = run_rounds(other.grid, other.lead, other.run_until(2))
    assert [brought.adapter is not None for _, brought in asked] == [True] * 3 + [False] * 3 + [True] * 3
    assert state.adapter.digest() == whole.adapter.digest()


@pytest.mark.parametrize("what", ["reference", "difference"])
def test_what_a_server_puts_in_its_place_is_refused_and_not_kept(
    federation: Callable[..., Any], intercept: Callable[..., None], what: str
) -> None:
    made = federation(num_rounds=1, bits=8)

    def change(message: Message) -> None:
        sent = flower_records.to_brought(message.content)
        assert sent.adapter
        end = {name: value + 1 for name, value in sent.adapter.tensors.items()}
        wrong = Difference.between(sent.adapter.tensors, end, bits=8, about="")
        put = replace(sent, adapter=Adapter(end)) if what == "reference" else replace(sent, difference=wrong)
        message.content.update(flower_records.from_brought(put))

    intercept(2, change)
    state = run_rounds(made.grid, made.lead, made.start)
    assert state.rounds[0].failed_sites == {"site-2": "adapter_differs"}
    assert not made.reference_of("site-2").exists()
    assert made.reference_of("site-1").exists()


def test_a_difference_of_another_shape_is_refused(
    federation: Callable[..., Any], intercept: Callable[..., None]
) -> None:
    made = federation(num_rounds=1, bits=8)

    def change(message: Message) -> None:
        sent = flower_records.to_brought(message.content)
        assert sent.difference
        levels = {name: value.reshape(-1) for name, value in sent.difference.levels.items()}
        flat = Difference(bits=8, steps=sent.difference.steps, levels=levels)
        message.content.update(flower_records.from_brought(replace(sent, difference=flat)))

    intercept(2, change)
    state = run_rounds(made.grid, made.lead, made.start)
    assert state.rounds[0].failed_sites == {"site-2": "adapter_shape"}


def test_steps_that_are_alike_lose_nothing(federation: Callable[..., Any]) -> None:
    made = federation(num_rounds=1, bits=4)
    state = run_rounds(made.grid, made.lead, made.start)
    for name, value in state.adapter.tensors.items():
        moved = value - made.adapter.tensors[name]
        np.testing.assert_allclose(moved, np.mean(list(STEPS.values())), rtol=1e-5, atol=1e-6)

"""The lead's grid against a real server and real sites, each a process that may die."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedtune.flower.records import ARRAYS
from fedtune.flower.remote_grid import RemoteGrid

from .faults import Faulty
from .loopback import Loopback

VALUES = {"b.lora_A": np.arange(6, dtype=np.float32).reshape(2, 3), "head": np.full(4, -0.5, np.float32)}


def questions(numbers: Sequence[int] = (1, 2), values: dict[str, np.ndarray] = VALUES) -> list[Message]:
    content = RecordDict({ARRAYS: ArrayRecord({name: Array(value) for name, value in values.items()})})
    return [Message(content, number, "train") for number in numbers]


def sites_of(answers: Sequence[Message]) -> dict[int, str]:
    """Node -> the site that says it has answered."""
    return {answer.metadata.src_node_id: str(about(answer)["site"]) for answer in answers}


def about(answer: Message) -> Any:
    return answer.content.config_records["about"]


def test_arrays_travel_both_ways_and_nodes_are_numbered_in_the_order_of_the_roster(network: Loopback) -> None:
    network.site("a")
    network.site("b")
    with network.grid(["b", "a"]) as grid:
        assert list(grid.get_node_ids()) == [1, 2]
        answers = grid.send_and_receive(questions(), timeout=30)
    assert sites_of(answers) == {1: "b", 2: "a"}
    for answer in answers:
        arrays = answer.content.array_records[ARRAYS]
        assert list(arrays) == list(VALUES)
        for name, value in VALUES.items():
            np.testing.assert_array_equal(arrays[name].numpy(), value)
            assert arrays[name].numpy().dtype == np.float32



_LEADS_CALLS = ("get-nodes", "push-messages", "push-object", "pull-messages", "pull-object", "confirm-message-received")


def test_lead_faults(network: Loopback) -> None:
    network.site("a")
    network.site("b", works_s=0.3)
    with network.grid(["a", "b"]) as grid:
        faulty = Faulty(grid._opened._client)
        for call in _LEADS_CALLS:
            for when in ("before", "after"):
                faulty.break_at(call, when)
                began = time.monotonic()
                answers = grid.send_and_receive(questions(), timeout=12)
                print(call, when, not faulty.waits, sites_of(answers), time.monotonic() - began)


def test_site_faults(network: Loopback) -> None:
    faults = [(call, when) for call in ("pull-messages", "pull-object", "confirm-message-received", "push-messages", "push-object") for when in ("before", "after")]
    site = network.site("a", faults=faults)
    with network.grid(["a"]) as grid:
        for fault in faults:
            began = time.monotonic()
            answers = grid.send_and_receive(questions([1]), timeout=30)
            print(sites_of(answers), time.monotonic() - began, site.events("fault")[-1], site.events("trouble")[-1:], site.events("dropped")[-1:])

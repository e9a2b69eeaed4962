"""fedtune in a federation of stock Flower processes, with equal adapters and ledgers at sites without a network."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtune.ops.doctor.connection_checks import check_control_api

from .books import check_full_run, check_same_adapter
from .stock import NODE_USER, STRICT, StockFederation, explain_missing_users

DEBUG = (
    *("experiment=debug", "runtime.device=cpu", "runtime.num_threads=1", "runtime.seeded_noise=true"),
    *("model.dtype=float32", "data.validation_rows=10", "data.test_rows=10", "federation.num_rounds=2"),
)
APP = Path(__file__).with_name("stock_app")
pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory, command: Any) -> Iterator[StockFederation]:
    if reason := explain_missing_users():
        pytest.skip(reason)
    federation = StockFederation(tmp_path_factory.mktemp("stock"), command)
    try:
        federation.start()
        yield federation
    finally:
        federation.close()


def test_stock_supernodes_match_the_simulation_adapter_next_to_a_stock_app(
    stock: StockFederation, run_in_one_process: Callable[..., Path]
) -> None:
    """The stock app runs at SuperNodes that may install it and finds no secrets; the strict site refuses it."""
    files = [path for folder in (stock.home, stock.folder / "sites") for path in folder.rglob("*") if path.is_file()]
    assert {"questions.csv", "site.toml", "connection_key.pem", "lead_key.pem"} <= {path.name for path in files}
    secrets = "|".join(map(str, files))
    other = stock.submit_app(APP, f'secrets="{secrets}" into="{stock.folder / "found.json"}"')
    run = stock.submit("one", DEBUG)
    assert stock.wait_until_over(run) == "finished:completed", stock.call("flwr", "log", run, "banks", "--show")
    check_same_adapter(stock, "one", run_in_one_process("one", *DEBUG), tolerance=0)
    check_full_run(stock, "one", rounds=2)
    assert [site.count_answers("update", "one") for site in stock.sites.values()] == [2, 2, 2]
    assert stock.wait_until_over(other) == "finished:completed", stock.call("flwr", "log", other, "banks", "--show")
    report = json.loads((stock.folder / "found.json").read_text())
    assert report == {"averaged": [1.0] * 3, "files": 0, "processes": 0, "modules": 0, "user": NODE_USER}
    assert f"Permission denied: '{stock.public / STRICT / 'apps'}" in stock.call(
        "flwr", "log", other, "banks", "--show"
    )
    assert check_control_api(stock.address, timeout_s=10.0).status == "failed", "this setup is for tests only"
    if stock.front != stock.address:
        assert check_control_api(stock.front, timeout_s=10.0).status == "ok"


def test_killed_flower_processes_cause_no_loss_or_double_charge(
    stock: StockFederation, run_in_one_process: Callable[..., Path]
) -> None:
    north = stock.sites["north"]
    north.hold(True)
    run = stock.submit("two", DEBUG)
    north.wait_for("two", "reserve", round=1)
    stock.kill(stock.nodes["north"])
    stock.restart_node(north)
    stock.kill(stock.server)
    stock.start_superlink()
    north.hold(False)
    north.wait_for("two", "commit", round=1)
    stock.kill(stock.superexec)
    assert stock.wait_until_over(run) == "finished:failed"
    stock.start_lead()
    rerun = stock.submit("two-again", [f"resume={stock.run_folder('two')}"], new_run=False)
    assert stock.wait_until_over(rerun) == "finished:completed", stock.call("flwr", "log", rerun, "banks", "--show")
    check_same_adapter(stock, "two", run_in_one_process("two", *DEBUG), tolerance=0)
    check_full_run(stock, "two", rounds=2)


def test_killed_site_is_asked_again_and_charged_for_started_rounds(stock: StockFederation) -> None:
    north = stock.sites["north"]
    north.hold(True)
    run = stock.submit("three", [*DEBUG, "federation.spare_rounds=1"])  # for the charge of the killed round
    north.wait_for("three", "reserve", round=1)
    north.up.kill()
    north.hold(False)
    stock.start_site(north)
    assert stock.wait_until_over(run) == "finished:completed", stock.call("flwr", "log", run, "banks", "--show")
    check_full_run(stock, "three", charged={"north": 3, "south": 2, "west": 2})

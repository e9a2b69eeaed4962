"""What a simulation runs on: the in-process grid, and Flower's Ray engine as far as it can be looked at without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flwr.simulation
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

import fedtune.flower.simulation as simulation
from fedtune.cli.compose import compose_run
from fedtune.config import RunConfig
from fedtune.federation.lead import LeadState
from fedtune.flower.simulation import InProcessGrid
from fedtune.model import Adapter
from fedtune.spec import ConfigError, RunError


def test_each_message_reaches_its_node_and_its_reply_is_handed_out_once() -> None:
    app = ClientApp()
    asked: list[int] = []
    replied: list[int] = []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        asked.append(int(context.node_config["partition-id"]))
        return Message(RecordDict(), reply_to=message)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    grid = InProcessGrid(app, 3, replied=replied.append)
    assert list(grid.get_node_ids()) == [1, 2, 3]
    grid.send_and_receive([grid.create_message(RecordDict(), "query", 1, "1")])
    assert replied == [], "an introduction is no progress of a round"
    messages = [grid.create_message(RecordDict(), "train", node, "1") for node in (3, 1)]
    answers = grid.send_and_receive(messages)
    assert [answer.metadata.src_node_id for answer in answers] == [3, 1]
    assert [answer.metadata.reply_to_message_id for answer in answers] == [m.metadata.message_id for m in messages]
    assert (asked, replied) == ([2, 0], [1, 2])
    ids = grid.push_messages([grid.create_message(RecordDict(), "train", 2, "1")])
    assert len(grid.pull_messages(ids)) == 1
    assert grid.pull_messages(ids) == []
    with pytest.raises(NotImplementedError):
        _ = grid.run
    with pytest.raises(NotImplementedError):
        grid.set_run(None)  # type: ignore[arg-type]


@pytest.fixture
def config(tiny: Any, tmp_path: Path) -> RunConfig:
    settings = tiny("runtime=ray", "federation.num_sites=3", "federation.participants=[site-1,site-3]", into=tmp_path)
    return compose_run([*settings, "runtime.num_threads=2"])


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for Flower's engine: calls the server app here, and wraps what it raises as Flower does."""
    arguments: dict[str, Any] = {}

    def run_simulation(server_app: Any, client_app: Any, **rest: Any) -> None:
        arguments.update(rest)
        try:
            server_app._main(None, None)
        except BaseException as error:
            raise RuntimeError("Exception in ServerApp thread") from error

    monkeypatch.setattr(flwr.simulation, "run_simulation", run_simulation)
    monkeypatch.setattr(simulation.importlib.util, "find_spec", lambda name: object())
    return arguments


def test_without_the_extra_it_says_how_to_install_it(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the extra: pip install 'fedtune\[ray\]'"):
        simulation.on_ray(lambda grid: LeadState(round=0, adapter=Adapter({})), None, config)  # type: ignore[arg-type]


def test_it_starts_a_node_for_each_participant_with_the_threads_of_the_run(
    config: RunConfig, started: dict[str, Any]
) -> None:
    state = LeadState(round=1, adapter=Adapter({}))
    assert simulation.on_ray(lambda grid: state, None, config) is state  # type: ignore[arg-type]
    assert started["num_supernodes"] == 2
    assert started["backend_config"]["client_resources"]["num_cpus"] == 2
    assert started["backend_config"]["init_args"]["num_cpus"] >= 2


@pytest.mark.parametrize("error", [RunError("too few"), ConfigError("a", 1, "b"), KeyboardInterrupt()])
def test_an_error_of_the_run_keeps_its_type(config: RunConfig, started: dict[str, Any], error: BaseException) -> None:
    def fails(grid: object) -> LeadState:
        raise error

    with pytest.raises(type(error)) as raised:
        simulation.on_ray(fails, None, config)  # type: ignore[arg-type]
    assert raised.value is error

"""Runtimes of a simulation: the in-process grid, and Flower's engine without Ray."""

import json
import os
import sys
import threading
import unittest.mock
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedtune.api.compose import compose_run
from fedtune.config import RunConfig
from fedtune.federation.lead import LeadState
from fedtune.flower import local_engine
from fedtune.flower.bundle import make_server_app
from fedtune.flower.internals import set_sender_ids
from fedtune.flower.local_engine import compute_gpu_share
from fedtune.flower.simulation import InProcessGrid
from fedtune.flower.site_app import SiteUnavailable, forward_message
from fedtune.model.adapter import Adapter
from fedtune.spec import ConfigError, RunError
from fedtune.training.spec import RuntimeSpec
from fedtune.version import __version__

from ..cli import snapshots
from .test_asking_grid import FakeGrid


def test_every_message_reaches_its_node_and_is_answered() -> None:
    app = ClientApp()
    calls: list[int] = []
    replied: list[int] = []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        calls.append(int(context.node_config["partition-id"]))
        return Message(RecordDict(), reply_to=message)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    grid = InProcessGrid(app, 3, replied=replied.append)
    assert list(grid.get_node_ids()) == [1, 2, 3]
    list(grid.receive([Message(RecordDict(), 1, "query")]))
    assert replied == [], "an introduction must not count as progress"
    messages = [Message(RecordDict(), node, "train") for node in (3, 1)]
    answers = list(grid.receive(messages))
    assert [answer.metadata.src_node_id for answer in answers] == [3, 1]
    assert [answer.metadata.reply_to_message_id for answer in answers] == [m.metadata.message_id for m in messages]
    assert (calls, replied) == ([2, 0], [1, 2])


@pytest.fixture
def compose_ray(tiny: Any, tmp_path: Path) -> Callable[..., RunConfig]:
    settings = tiny("runtime=ray", "federation.num_sites=3", "federation.participants=[site-1,site-3]", into=tmp_path)
    return lambda *more: compose_run([*settings, "runtime.num_threads=2", *more])


STATE = LeadState(round=1, adapter=Adapter({}))


class Engine:
    """A stand-in for Flower's processes: `flwr run` calls the bundle's ServerApp with this grid."""

    def __init__(self) -> None:
        self.started: list[tuple[Sequence[str], Mapping[str, str]]] = []
        self.grid: Any = FakeGrid(self.answer)
        self.fails = ""

    def answer(self, message: Message, number: int) -> Message:
        content = RecordDict({"site": ConfigRecord({"name": f"site-{number}"})})
        return Message(Error(3, "no file") if number == 2 else content, reply_to=message)

    @contextmanager
    def start(self, *words: str, environment: Mapping[str, str], output: Any) -> Iterator[Any]:
        self.started.append((words, environment))
        code = 1 if words[0] == self.fails else None
        if words[0] == "flwr" and code is None:
            self.thread = threading.Thread(target=self.serve, args=[environment])
            self.thread.start()
        yield SimpleNamespace(poll=lambda: code, wait=lambda timeout: self.thread.join() if code is None else None)

    def serve(self, environment: Mapping[str, str]) -> None:
        with unittest.mock.patch.dict(os.environ, environment), suppress(SystemError):
            make_server_app(Mock())(self.grid, Context(7, 1, {}, state=RecordDict(), run_config={"run": ""}))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    set_sender_ids(run_id=7, node_id=1, task_id=0)
    fake_engine = Engine()
    monkeypatch.setattr(local_engine, "_run_flower_command", fake_engine.start)
    monkeypatch.setattr(local_engine, "_is_open", lambda port: True)
    monkeypatch.setattr(local_engine, "_POLL_S", 0.01)
    return fake_engine


def test_run_is_submitted_with_flwr_run_and_relayed_by_the_server_app(
    compose_ray: Any, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "hub.example.org")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    sealed: list[tuple[Path, Any]] = []

    def run_lead(transport: Any) -> LeadState:
        ((path,), grid) = (tmp_path / "sites").iterdir(), transport._grid
        sealed.append((path, json.loads(path.read_text())))
        assert grid.get_node_ids() == [700, 701, 702]
        messages = [Message(RecordDict(), node, "train") for node in (702, 700, 701)]
        answers = list(grid.receive(messages, timeout=5.0))
        assert [answer.metadata.src_node_id for answer in answers] == [702, 700, 701]
        assert [answer.has_error() for answer in answers] == [False, True, False]
        assert answers[0].content.config_records["site"]["name"] == "site-1"
        assert not engine.grid.replies, "each reply must be fetched once"
        engine.grid.answer = lambda *_: None
        assert list(grid.receive([Message(RecordDict(), 700, "train")], timeout=0.05)) == []
        engine.grid.answer = engine.answer
        engine.grid.asked.clear()
        introductions = grid.receive([Message(RecordDict(), node, "query") for node in (701, 702)], timeout=5.0)
        with pytest.raises(RunError, match=r"a simulated Flower node could not join the run: no file"):
            list(introductions)
        return STATE

    assert (
        local_engine.run_on_flower(run_lead, compose_ray("runtime.device=auto"), tmp_path, tmp_path / "sites") is STATE
    )
    assert engine.grid.asked == [(701, "query"), (702, "query")]
    (path, content), (superlink, run) = sealed[0], engine.started
    assert not path.exists()
    assert (content["folder"], content["started_in"]) == (str(tmp_path), os.getcwd())
    assert content["config"]["runtime"]["sites_per_gpu"] == 2, "sites must know how many share a GPU's memory"
    assert run[0][:2] == ("flwr", "run")
    assert run[0][3:6] == ("local", "--stream", "--run-config")
    assert (run[0][6], superlink[0][0]) == (f'run="{path}"', "flower-superlink")
    assert run[1]["NO_PROXY"] == run[1]["no_proxy"] == "hub.example.org,127.0.0.1"
    assert run[1]["RAY_ADDRESS"] == "local"
    assert Path(run[1]["FLWR_HOME"]).parent == tmp_path
    assert not Path(run[1]["FLWR_HOME"]).exists(), "only Flower's log may remain"
    assert run[1]["FLWR_TELEMETRY_ENABLED"] == "0"


@pytest.mark.parametrize("error", [RunError("too few"), ConfigError("a", 1, "b"), KeyboardInterrupt(), OSError("full")])
def test_run_error_keeps_its_type(compose_ray: Any, engine: Engine, error: Any, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as raised:
        local_engine.run_on_flower(Mock(side_effect=error), compose_ray(), tmp_path, tmp_path / "sites")
    assert raised.value is error
    assert not engine.thread.is_alive(), "the ServerApp must end with the lead"


@pytest.mark.parametrize("fails", ["flower-superlink", "flwr", "in the run"])
def test_engine_start_failure_or_crash_ends_the_run(
    compose_ray: Any, engine: Engine, fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_engine, "_is_open", lambda port: fails != "flower-superlink")
    engine.fails, engine.grid = fails, Mock(spec=Grid, get_node_ids=Mock(side_effect=SystemError))
    with pytest.raises(RunError, match=r"engine did not start, or exited before the run ended; see flower\.log"):
        local_engine.run_on_flower(
            lambda transport: transport._grid.get_node_ids(), compose_ray(), tmp_path, tmp_path / "at"
        )
    assert list((tmp_path / "at").iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "gpus", "share"),
    [
        ({"device": "auto"}, 0, 0.0),
        ({"device": "cpu"}, 2, 0.0),
        ({"device": "auto"}, 2, 1 / 4),
        ({"device": "auto", "sites_per_gpu": 2}, 1, 1 / 2),
        ({"device": "auto", "ray_address": "auto", "num_threads": 1}, 2, 0.0),
        ({"device": "auto", "ray_address": "auto", "num_threads": 1, "sites_per_gpu": 2}, 0, 1 / 2),
    ],
)
def test_gpu_share_lets_all_sites_train_in_parallel(
    settings: Any, gpus: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert compute_gpu_share(RuntimeSpec(kind="ray", **settings), 8) == share
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ConfigError, match="sites_per_gpu = 3: must be null on a machine without a GPU"):
        compute_gpu_share(RuntimeSpec(kind="ray", device="auto", sites_per_gpu=3), 8)


def test_federation_config_sets_nodes_and_actor_resources(compose_ray: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(local_engine, "count_usable_cores", lambda: 4)
    describe = partial(local_engine.format_federation_config, share=0.5)
    expected = "num-supernodes=2 client-resources-num-gpus=0.5 init-args-num-cpus={} client-resources-num-cpus={}"
    assert describe(compose_ray()) == expected.format(4, 2)
    assert describe(compose_ray("runtime.num_threads=9")) == expected.format(9, 9), "only one actor has enough cores"
    secure = ("federation.participants=[]", "federation.aggregation=secure", "training.local_steps=1")
    assert describe(compose_ray(*secure)) == expected.format(4, 4).replace("supernodes=2", "supernodes=3"), (
        "one actor must have all keys"
    )
    cluster = describe(compose_ray("runtime.ray_address=10.1.2.3:6379"))
    assert cluster == "num-supernodes=2 client-resources-num-gpus=0.5 client-resources-num-cpus=2"


def test_actor_answers_only_for_its_own_run(compose_ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_engine, "Participants", lambda config, folder: SimpleNamespace(config=config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    sys.modules["ray"].is_initialized = lambda: True  # type: ignore[attr-defined]
    file = tmp_path / "simulation.json"
    content = {"config": compose_ray().to_json(), "folder": str(tmp_path), "started_in": "/", "fedtune": __version__}

    def name() -> str:
        context = Context(1, 7, {"partition-id": 1}, state=RecordDict(), run_config={"run": str(file)})
        return str(forward_message(context, "query", 0.0, RecordDict()).config_records["site"]["name"])

    with pytest.raises(RunError, match=rf"cannot read {file} \(No such file"):
        name()
    for change, message in (
        ({"started_in": "/nowhere"}, r"cannot read /nowhere \(No such file"),
        ({"fedtune": "0.0.1"}, rf"has fedtune {__version__}, but the lead has 0\.0\.1"),
    ):
        file.write_text(json.dumps(content | change))
        with pytest.raises(RunError, match=message):
            name()
    file.write_text(json.dumps(content))
    assert (name(), os.getcwd()) == ("site-3", "/")
    sys.modules["ray"].is_initialized = lambda: False  # type: ignore[attr-defined]
    with pytest.raises(SiteUnavailable):  # a SuperNode has only the socket, whatever the run contains
        name()


@snapshots.parametrize_mistakes("mistakes-cluster")
def test_contradictory_cluster_settings_are_refused(compose_ray: Any, typed: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose_ray(*typed.split())
    snapshots.check_message("mistakes-cluster", typed, str(error.value))

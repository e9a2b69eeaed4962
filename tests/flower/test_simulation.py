"""What a simulation runs on: the in-process grid, and Flower's Ray engine as far as it can be looked at without Ray."""

import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import flwr.simulation
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

import fedtune.flower.ray_engine as ray_engine
from fedtune.api.compose import compose_run
from fedtune.config import RunConfig
from fedtune.federation.lead import LeadState
from fedtune.flower.ray_engine import RayNode, gpu_share, looker
from fedtune.flower.simulation import InProcessGrid
from fedtune.model.adapter import Adapter
from fedtune.spec import ConfigError, RunError
from fedtune.training.spec import RuntimeSpec

from ..cli import snapshots


def test_each_message_reaches_its_node_and_has_one_reply() -> None:
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
    list(grid.receive([Message(RecordDict(), 1, "query")]))
    assert replied == [], "an introduction is no progress of a round"
    messages = [Message(RecordDict(), node, "train") for node in (3, 1)]
    answers = list(grid.receive(messages))
    assert [answer.metadata.src_node_id for answer in answers] == [3, 1]
    assert [answer.metadata.reply_to_message_id for answer in answers] == [m.metadata.message_id for m in messages]
    assert (asked, replied) == ([2, 0], [1, 2])


@pytest.fixture
def composed(tiny: Any, tmp_path: Path) -> Callable[..., RunConfig]:
    settings = tiny("runtime=ray", "federation.num_sites=3", "federation.participants=[site-1,site-3]", into=tmp_path)
    return lambda *more: compose_run([*settings, "runtime.num_threads=2", *more])


class Ray(ModuleType):
    """Stands in for Ray, with a cluster that holds what it is told and runs what it is given here and now."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.resources = {"a": {"CPU": 4.0}, "b": {"CPU": 2.0, "GPU": 2.0}, "head": {"memory": 1.0}}
        self.free: dict[str, float] = {"CPU": 6.0, "GPU": 2.0}
        self.init, self.shutdown = Mock(), Mock()
        self.available_resources = lambda: self.free
        self.elsewhere: dict[str, str] = {}
        exceptions, strategies = ModuleType("ray.exceptions"), ModuleType("ray.util.scheduling_strategies")
        exceptions.RayError = OSError  # type: ignore[attr-defined]
        strategies.NodeAffinitySchedulingStrategy = lambda node_id, soft: node_id  # type: ignore[attr-defined]
        self.parts = {"ray": self, "ray.exceptions": exceptions, "ray.util.scheduling_strategies": strategies}

    def nodes(self) -> list[dict[str, Any]]:
        gone = {"NodeID": "4", "NodeManagerHostname": "gone", "Alive": False, "Resources": {"CPU": 64.0}}
        named = [
            {"NodeID": name, "NodeManagerHostname": name, "Resources": has} for name, has in self.resources.items()
        ]
        return [gone, *({**node, "Alive": True} for node in named)]

    def remote(self, *, num_cpus: int) -> Callable[[Callable[[], dict[str, str]]], Any]:
        return lambda look: SimpleNamespace(
            options=lambda scheduling_strategy: SimpleNamespace(
                remote=lambda: look() | (self.elsewhere if scheduling_strategy == "b" else {})
            )
        )

    def get(self, found: Any, timeout: float) -> Any:
        return found


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    ray = Ray()
    for name, part in ray.parts.items():
        monkeypatch.setitem(sys.modules, name, part)
    monkeypatch.setattr(ray_engine.socket, "create_connection", lambda *_, **__: socket.socket())
    monkeypatch.setattr(ray_engine, "_FREE_WITHIN_S", 0.0)
    return ray


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, ray: Ray) -> dict[str, Any]:
    """Stands in for Flower's engine: calls the server app here, and wraps what it raises as Flower does."""
    arguments: dict[str, Any] = {}

    def run_simulation(server_app: Any, client_app: Any, **rest: Any) -> None:
        arguments.update(rest)
        try:
            server_app._main(None, None)
        except BaseException as error:
            raise RuntimeError("Exception in ServerApp thread") from error

    monkeypatch.setattr(flwr.simulation, "run_simulation", run_simulation)
    return arguments


STATE = LeadState(round=1, adapter=Adapter({}))
CLUSTER, OF_GPU = "runtime.ray_address=10.1.2.3:6379", "runtime.device=auto runtime.sites_per_gpu"


def on_ray(config: RunConfig, sites: Path, run: Any = lambda grid: STATE, of_sites: Any = lambda _: None) -> LeadState:
    return ray_engine.on_ray(run, of_sites, config, sites)


def test_it_starts_a_node_for_each_participant_with_the_threads_of_the_run(
    composed: Any, started: dict[str, Any], ray: Ray, tmp_path: Path
) -> None:
    assert on_ray(composed(), tmp_path) is STATE
    assert started["num_supernodes"] == 2
    assert started["backend_config"]["client_resources"]["num_cpus"] == 2
    (joined,) = ray.init.call_args_list
    assert joined.kwargs["address"] == "local"
    assert joined.kwargs["num_cpus"] >= 2
    ray.shutdown.assert_called_once()


@pytest.mark.parametrize("error", [RunError("too few"), ConfigError("a", 1, "b"), KeyboardInterrupt()])
def test_an_error_of_the_run_keeps_its_type(composed: Any, started: Any, error: Any, ray: Ray, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as raised:
        on_ray(composed(), tmp_path, Mock(side_effect=error))
    assert raised.value is error
    ray.shutdown.assert_called_once()


@pytest.mark.parametrize(
    ("device", "sites_per_gpu", "num_sites", "gpus", "share"),
    [
        ("auto", None, 8, (0.0, 0.0), 0.0),
        ("cpu", None, 8, (1.0, 1.0), 0.0),
        ("auto", None, 8, (1.0, 1.0), 1 / 4),
        ("cuda", None, 8, (2.0, 1.0), 1 / 3),
        ("auto", None, 2, (4.0, 0.0), 1.0),
        ("auto", 2, 8, (1.0, 1.0), 1 / 2),
    ],
)
def test_sites_share_the_gpus_of_the_cluster_so_that_all_can_train_at_a_time(
    device: Any, sites_per_gpu: int | None, num_sites: int, gpus: tuple[float, ...], share: float
) -> None:
    nodes = [RayNode(str(number), "", 64.0, count) for number, count in enumerate(gpus)]
    runtime = RuntimeSpec(kind="ray", device=device, sites_per_gpu=sites_per_gpu)
    assert gpu_share(runtime, num_sites, nodes) == share
    if share and sites_per_gpu is None:
        assert sum(node.room(threads=1, share=share) for node in nodes) >= num_sites
    rooms = [RayNode("1", "", 7.0, have).room(threads=2, share=of) for have, of in ((0.0, 0.0), (1.0, 0.5), (0.0, 0.5))]
    assert rooms == [3, 2, 0], "room is counted by node"


def test_sites_know_how_many_share_a_gpu(composed: Any, started: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(ray_engine, "gpu_share", lambda *_: 1 / 3)
    monkeypatch.setattr(ray_engine, "check_room", lambda *_, **__: None)
    seen: list[RunConfig] = []
    on_ray(composed("runtime.device=auto"), tmp_path, of_sites=seen.append)
    assert [one.runtime.sites_per_gpu for one in seen] == [3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("runtime.num_threads=5", r"num_threads = 5: must be at most .*a: 4 and 0; b: 2 and 2; head: 0 and 0"),
        (f"{OF_GPU}=4 runtime.num_threads=3", r"sites_per_gpu = 4: .* a GPU beside 3 CPUs"),
    ],
)
def test_a_part_of_no_node_is_refused(composed: Any, started: Any, settings: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        on_ray(composed(*settings.split()), tmp_path)
    assert not started


def test_a_cluster_that_others_use_is_refused(composed: Any, started: dict[str, Any], ray: Ray, tmp_path: Path) -> None:
    ray.free = {"CPU": 5.0}
    with pytest.raises(RunError, match="others use 1 of 6 CPUs and 2 of 2 GPUs of the Ray cluster"):
        on_ray(composed(CLUSTER), tmp_path)
    assert not started
    ray.free = {"CPU": 6.0, "GPU": 2.0}
    assert on_ray(composed(CLUSTER), tmp_path) is STATE
    assert ray.init.call_args.kwargs["address"] == "10.1.2.3:6379"
    assert "num_cpus" not in ray.init.call_args.kwargs, "Ray would refuse it"


@pytest.mark.parametrize("key", ["working folder", "tracking.output_dir", "data.train_file", "model.path", "fedtune"])
def test_what_a_node_does_not_see_is_named(composed: Any, started: Any, ray: Ray, key: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    config = composed(CLUSTER)
    (tmp_path / "train.csv").write_text("text,label\n")
    data = replace(config.data, train_file=str(tmp_path / "train.csv"))
    config = replace(config, model=replace(config.model, path=str(tmp_path / "model")), data=data)
    assert on_ray(config, tmp_path) is STATE
    started.clear()
    ray.elsewhere = {key: ""}
    with pytest.raises(ConfigError, match=f"{key} = .* must be the same on every node of the Ray cluster; node b has"):
        on_ray(config, tmp_path)
    assert not started


def test_a_node_looks_from_the_working_folder_and_tells_other_files_of_the_name_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    key, records = tmp_path / "key", tmp_path / "here" / "records"
    key.write_text("one")
    look = looker({"working folder": str(tmp_path / "here"), "file": "records", "key": str(key)}, sealed="key")
    first = look()
    records.write_text("")
    monkeypatch.chdir("/")
    assert (first["file"], look()["file"]) == ("", "there")
    assert look()["key"] == first["key"] != ""
    key.write_text("another")
    assert look()["key"] != first["key"]
    key.unlink()
    assert look()["key"] == ""


def test_nobody_knocks_for_long_where_there_is_no_cluster(composed: Any, ray: Ray, tmp_path: Path) -> None:
    ray.init.side_effect = ConnectionError("nobody\nAdvice")
    for address in ("10.1.2.3:6379", "auto"):
        with pytest.raises(ConfigError, match=rf"ray_address = '{address}': must be a Ray cluster .* \(nobody\)$"):
            on_ray(composed(f"runtime.ray_address={address}"), tmp_path)


@snapshots.mistakes("mistakes-cluster")
def test_settings_of_a_cluster_that_contradict_each_other_are_refused(composed: Any, typed: str) -> None:
    with pytest.raises(ConfigError) as error:
        composed(*typed.split())
    snapshots.check_message("mistakes-cluster", typed, str(error.value))

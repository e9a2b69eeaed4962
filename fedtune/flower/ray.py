"""Flower's own simulation engine on a Ray cluster (`runtime=ray`): a process for each site that runs at a time."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.server.superlink.fleet.vce.backend.backend import BackendConfig
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedtune.config import RunConfig
from fedtune.federation.lead import LeadState
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
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
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
        "client_resources": {"num_cpus": threads, "num_gpus": 0.0},
    }
    try:
        run_simulation(app, client_app, num_supernodes=len(config.federation.active), backend_config=backend)
    except BaseException as error:
        raise (failure[0] if failure else error) from None
    if failure:
        raise failure[0]
    if not outcome:
        raise RunError("Flower's simulation engine ended without a result; see log.txt")
    return outcome[0]

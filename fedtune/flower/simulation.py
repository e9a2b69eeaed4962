"""A whole federation on this machine: the apps of real sites over an in-process grid or Flower's Ray engine."""

from __future__ import annotations

import json
from pathlib import Path

from flwr.app import Context
from flwr.clientapp import ClientApp

from fedtune.config import RunConfig, parse
from fedtune.federation.results import RunResult
from fedtune.flower.client import make_client_app
from fedtune.flower.federation_run import Engine, FederationRun, Listener
from fedtune.flower.grid import InProcessGrid, in_process
from fedtune.flower.invitation import Invited
from fedtune.sites.participants import participants


def simulate(config: RunConfig, folder: Path, listener: Listener) -> RunResult:
    """Run `config` to its end, or from its newest checkpoint on, and write the run folder.

    Returns:
        The content of `run.json`.

    Raises:
        ConfigError: data, model or checkpoint don't fit the configuration; raised before any training.
        RunError: too few sites replied.
    """
    config_json = json.dumps(config.to_json())
    everyone = participants(config_json, str(folder))

    def ready() -> None:
        _ = [work.examples for work in everyone.work.values()]
        everyone.sites.check_dealt_out()

    return FederationRun(
        config=config,
        folder=folder,
        shared=everyone.shared,
        asked=Invited(
            proposal=config.proposal(lead=everyone.sites.lead_key().public, plan=everyone.plan),
            key=everyone.sites.lead_key(),
            federation=config.federation,
        ),
        receipts=everyone.sites.receipts(),
        engine=_engine(config, simulated_client_app(config_json, str(folder)), listener),
        ready=ready,
    ).to_its_end(listener)


def simulated_client_app(config_json: str, folder: str) -> ClientApp:
    """The ClientApp of every virtual site; plain values only, so that it can be sent to another process."""
    names = parse(json.loads(config_json)).federation.active

    def index(context: Context) -> int:
        return int(context.node_config["partition-id"])

    def name_of(context: Context) -> str:
        return names[index(context)]

    return make_client_app(lambda context, _: participants(config_json, folder).site(index(context)), name_of)


def _engine(config: RunConfig, client_app: ClientApp, listener: Listener) -> Engine:
    if config.runtime.kind == "ray":
        from fedtune.flower.ray import on_ray  # Ray is an extra

        return lambda run: on_ray(run, client_app, config)
    grid = InProcessGrid(client_app, len(config.federation.active), replied=listener.site_replied)
    return lambda run: in_process(run, grid)

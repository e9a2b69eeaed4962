"""A whole federation on this machine: the apps of real sites over an in-process grid or Flower's Ray engine."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedtune.config import RunConfig, parse
from fedtune.federation.checkpoint import Checkpoints
from fedtune.federation.lead import LeadState
from fedtune.federation.results import FinalResult, run_json
from fedtune.flower.client import make_client_app
from fedtune.flower.grid import InProcessGrid, in_process
from fedtune.flower.server import Lead, run_rounds
from fedtune.flower.strategy import make_strategy, restore_strategy
from fedtune.model import save_task_model
from fedtune.privacy.durable import write_durably
from fedtune.privacy.plan import Plan
from fedtune.sites.participants import Participants, participants


class Listener(Protocol):
    """Follows a run, to show it."""

    def prepared(self, everyone: Participants, plan: Plan, state: LeadState) -> None:
        """Data and model are ready; training is about to begin."""

    def site_replied(self, number: int) -> None:
        """The `number`-th reply of the current round came in."""

    def round_finished(self, state: LeadState) -> None:
        """A round was aggregated, scored and checkpointed."""


def simulate(config: RunConfig, folder: Path, listener: Listener) -> dict[str, object]:
    """Run `config` to its end, or from its newest checkpoint on, and write the run folder.

    Returns:
        The content of `run.json`.

    Raises:
        ConfigError: data, model or checkpoint don't fit the configuration; raised before any training.
        RunError: too few sites replied.
    """
    began = time.monotonic()
    config_json = json.dumps(config.to_json())
    everyone = participants(config_json, str(folder))
    plan = everyone.plan
    checkpoints = Checkpoints(folder / "checkpoints", config.digest())
    state = _first_state(config, everyone, checkpoints)
    began -= state.seconds
    strategy = make_strategy(config.federation)
    restore_strategy(strategy, state.strategy)

    def finished(state: LeadState) -> None:
        everyone.sites.keep_receipts(state.receipts)
        listener.round_finished(state)

    lead = Lead(
        proposal=config.proposal(lead=everyone.sites.lead_key().public, plan=plan),
        key=everyone.sites.lead_key(),
        federation=config.federation,
        declared_sizes=config.declared_sizes(),
        strategy=strategy,
        checkpoints=checkpoints,
        evaluate=lambda adapter: everyone.score(adapter, everyone.validation),
        finished=finished,
        elapsed=lambda: time.monotonic() - began,
        earlier_receipts=everyone.sites.receipts(),
    )
    listener.prepared(everyone, plan, state)
    client_app = simulated_client_app(config_json, str(folder))
    try:
        state = _engine(config, client_app, listener)(lambda grid: run_rounds(grid, lead, state))
    except BaseException:
        # What was charged is on record also for a run that ends early.
        _write_result(config, plan, checkpoints.load(), folder, metrics={}, seconds=time.monotonic() - began)
        raise
    metrics = everyone.score(state.adapter, everyone.test, generate=True)
    state.adapter.load_into(everyone.model)
    save_task_model(everyone.model, folder / "adapter")
    return _write_result(config, plan, state, folder, metrics=metrics, seconds=time.monotonic() - began)


def simulated_client_app(config_json: str, folder: str) -> ClientApp:
    """The ClientApp of every virtual site; plain values only, so that it can be sent to another process."""
    names = parse(json.loads(config_json)).federation.active

    def index(context: Context) -> int:
        return int(context.node_config["partition-id"])

    def name_of(context: Context) -> str:
        return names[index(context)]

    return make_client_app(lambda context: participants(config_json, folder).site(index(context)), name_of)


def _first_state(config: RunConfig, everyone: Participants, checkpoints: Checkpoints) -> LeadState:
    """Where the run starts: its newest checkpoint, or the initial adapter with its scores on the test file.

    The model is tried, and every file read and tokenised, here: what cannot work ends before anything is charged.
    """
    if config.resume is not None:
        state = checkpoints.load()
    everyone.check_model()
    _ = everyone.site_data, everyone.validation, everyone.test
    everyone.sites.check_dealt_out()
    if config.resume is not None:
        return state
    adapter = everyone.initial_adapter
    before = everyone.score(adapter, everyone.test, generate=True)
    state = LeadState(round=0, adapter=adapter, metrics_before=before)
    checkpoints.save(state)
    return state


Engine = Callable[[Callable[[Grid], LeadState]], LeadState]
"""Gives a grid to what is to run on it, and returns its result."""


def _engine(config: RunConfig, client_app: ClientApp, listener: Listener) -> Engine:
    if config.runtime.kind == "ray":
        from fedtune.flower.ray import on_ray  # Ray is an extra

        return lambda run: on_ray(run, client_app, config)
    grid = InProcessGrid(client_app, len(config.federation.active), replied=listener.site_replied)
    return lambda run: in_process(run, grid)


def _write_result(
    config: RunConfig, plan: Plan, state: LeadState, folder: Path, *, metrics: Mapping[str, float], seconds: float
) -> dict[str, object]:
    """Write `run.json`, and return its content."""
    final = FinalResult(
        metrics=metrics,
        metrics_before=state.metrics_before,
        seconds=seconds,
        peak_memory_bytes=_peak_memory_bytes(),
    )
    result = run_json(
        state,
        final,
        plan,
        sites=config.federation.active,
        task=config.task,
        config_sha256=config.digest(),
        seeded_noise=config.runtime.seeded_noise,
    )
    write_durably(folder / "run.json", json.dumps(result, indent=2).encode() + b"\n")
    return result


def _peak_memory_bytes() -> int:
    """Peak resident memory of this process (of each Ray actor not: they are not its children)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

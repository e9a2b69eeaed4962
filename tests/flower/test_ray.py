"""Flower's Ray engine, as far as it can be looked at without starting Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedtune.flower.ray as engine
from fedtune.cli.compose import compose_run
from fedtune.config import RunConfig
from fedtune.federation.lead import LeadState
from fedtune.model import Adapter
from fedtune.spec import ConfigError, RunError


@pytest.fixture
def config(tiny: Any, tmp_path: Path) -> RunConfig:
    settings = tiny("runtime=ray", "federation.num_sites=3", "federation.participants=[site-1,site-3]", into=tmp_path)
    return compose_run([*settings, "runtime.num_threads=2"])


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for Flower's engine: calls the server app here, and wraps what it raises as Flower does."""
    arguments: dict[str, Any] = {}

    def run_simulation(server_app: Any, client_app: Any, **rest: Any) -> None:
        arguments.update(rest)
        try:
            server_app._main(None, None)
        except BaseException as error:
            raise RuntimeError("Exception in ServerApp thread") from error

    monkeypatch.setattr(engine, "run_simulation", run_simulation)
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: object())
    return arguments


def test_without_the_extra_it_says_how_to_install_it(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the extra: pip install 'fedtune\[ray\]'"):
        engine.on_ray(lambda grid: LeadState(round=0, adapter=Adapter({})), None, config)  # type: ignore[arg-type]


def test_it_starts_a_node_for_each_participant_with_the_threads_of_the_run(
    config: RunConfig, started: dict[str, Any]
) -> None:
    state = LeadState(round=1, adapter=Adapter({}))
    assert engine.on_ray(lambda grid: state, None, config) is state  # type: ignore[arg-type]
    assert started["num_supernodes"] == 2
    assert started["backend_config"]["client_resources"]["num_cpus"] == 2
    assert started["backend_config"]["init_args"]["num_cpus"] >= 2


@pytest.mark.parametrize("error", [RunError("too few"), ConfigError("a", 1, "b"), KeyboardInterrupt()])
def test_an_error_of_the_run_keeps_its_type(config: RunConfig, started: dict[str, Any], error: BaseException) -> None:
    def fails(grid: object) -> LeadState:
        raise error

    with pytest.raises(type(error)) as raised:
        engine.on_ray(fails, None, config)  # type: ignore[arg-type]
    assert raised.value is error

"""Fixtures for tests of real deployments: one federation per module, and its logs after a failure."""

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from .federation import Federation, simulate_same_run
from .networks import explain_missing_namespaces, needs_loopback

_TAIL = 4000


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for federation in Federation.active:
            for log in federation.logs():
                name = log.relative_to(federation.folder)
                report.sections.append((f"end of {name}", log.read_text(errors="replace")[-_TAIL:]))
    return report


@pytest.fixture(scope="module")
def make_federation(tmp_path_factory: pytest.TempPathFactory, command: Any) -> Iterator[Callable[..., Federation]]:
    """Create federations for the module; with `held`, they are started with sites whose training can be paused."""
    federations: list[Federation] = []

    def make(*, held: bool | None = None, **arguments: Any) -> Federation:
        federations.append(Federation(tmp_path_factory.mktemp("federation"), command, **arguments))
        if held is not None:
            federations[-1].start(held=held)
        return federations[-1]

    yield make
    for federation in reversed(federations):
        federation.close()


@pytest.fixture(scope="module")
def run_in_one_process(tmp_path_factory: pytest.TempPathFactory, command: Callable[..., Any]) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("simulated")

    def run(name: str, *overrides: str) -> Path:
        outcome = command("simulate", *simulate_same_run(*overrides), f"name={name}", f"tracking.output_dir='{folder}'")
        assert outcome.code == 0, outcome.err
        return folder / name

    return run


@pytest.fixture(scope="session")
def make_networks() -> None:
    if reason := "FEDTUNE_TEST_NETWORK=loopback" if needs_loopback() else explain_missing_namespaces():
        pytest.skip(reason)

"""`fedtune simulate`: run folders, logs and what is shown while a federation runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from fedtune.cli.compose import compose_run, compose_sweep, saved_config, write_config
from fedtune.cli.display import Display, show_result, show_sweep
from fedtune.config import RunConfig
from fedtune.spec import ConfigError


def simulate(overrides: Sequence[str], *, multirun: bool) -> None:
    """Run one configuration, or each of a sweep.

    Raises:
        ConfigError: before any run begins, where that can be known.
        RunError: too few sites replied.
    """
    runs = compose_sweep(overrides) if multirun else [compose_run(overrides)]
    folders = [_folder(config) for config in runs]
    console = Console()
    results = [_run(config, folder, console) for config, folder in zip(runs, folders, strict=True)]
    if len(results) > 1:
        show_sweep(console, dict(zip(folders, results, strict=True)))


def _run(config: RunConfig, folder: Path, console: Console) -> dict[str, Any]:
    from fedtune.flower.simulation import simulate as run_simulation  # torch and Flower take seconds to import
    from fedtune.report.build import write_report

    new = not folder.exists()
    if new:
        write_config(config, folder)
    display = Display(console, config, shown=config.tracking.progress)
    try:
        with _log_to(folder / "log.txt", config.tracking.log_level), display:
            result = run_simulation(config, folder, display)
    except KeyboardInterrupt:
        console.print(f"\nInterrupted. Continue with: fedtune simulate resume={folder}")
        raise
    except ConfigError:
        if new and not (folder / "checkpoints").exists():
            _remove(folder)  # nothing ran: leave nothing behind
        raise
    write_report(folder, config, result)
    show_result(console, config, result, folder)
    return result


def _folder(config: RunConfig) -> Path:
    """The run's folder; it must be new, or the one to resume with the same configuration."""
    if config.resume is None:
        folder = Path(config.tracking.output_dir) / config.name
        if folder.exists():
            raise ConfigError("name", config.name, f"is taken: {folder} exists; choose another, or resume={folder}")
        return folder
    folder = Path(config.resume)
    if not folder.is_dir():
        raise ConfigError("resume", config.resume, "must be a run folder")
    if saved_config(folder).digest() != config.digest():
        differences = ", ".join(_differences(saved_config(folder).to_json(), config.to_json()))
        raise ConfigError("resume", config.resume, f"was made with another configuration ({differences})")
    return folder


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key in (key for key in old if key not in ("name", "resume", "tracking") and old[key] != new.get(key)):
        if isinstance(old[key], dict) and isinstance(new.get(key), dict):
            yield from _differences(old[key], new[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key} was {old[key]!r}, is {new.get(key)!r}"


def _remove(folder: Path) -> None:
    for name in ("config.yaml", "log.txt"):
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()


@contextmanager
def _log_to(path: Path, level: str) -> Iterator[None]:
    """Send fedtune's and Flower's log to a file; the terminal shows the run's progress only."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    loggers = [logging.getLogger(name) for name in ("fedtune", "flwr")]
    before = [(logger.level, logger.handlers[:], logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
    try:
        yield
    finally:
        handler.close()
        for logger, (old_level, handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(old_level)

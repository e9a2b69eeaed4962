"""`fedtune simulate`: run folders, logs and what is shown while a federation runs."""

from __future__ import annotations

import fcntl
import logging
import reprlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from fedtune.cli.compose import compose_run, compose_sweep, saved_config, write_config
from fedtune.config import RunConfig
from fedtune.spec import ConfigError, RunError


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
        from fedtune.cli.display import show_sweep

        show_sweep(console, dict(zip(folders, results, strict=True)))


def _run(config: RunConfig, folder: Path, console: Console) -> dict[str, Any]:
    # Here, because torch and Flower take seconds to import and a mistake in an override should not wait for them.
    from fedtune.cli.display import Display, show_result
    from fedtune.flower.simulation import simulate as run_simulation
    from fedtune.report.build import write_report
    from fedtune.sites.virtual_site import fitted

    if config.resume is None:
        config = _told(console, config, fitted(config, folder))
        _make(folder, config)
    display = Display(console, config, shown=config.tracking.progress)
    try:
        with _only_one(folder), _log_to(folder / "log.txt", config.tracking.log_level), display:
            result = run_simulation(config, folder, display)
    except BaseException as error:
        begun = any(folder.glob("checkpoints/round-*.safetensors"))
        if config.resume is None and not begun:
            _remove(folder)  # nothing ran: leave nothing behind
        hint = f"Continue with: fedtune simulate resume={folder}" if begun else "Nothing had been trained yet."
        if isinstance(error, KeyboardInterrupt):
            console.print(f"\nInterrupted. {hint}", soft_wrap=True)
        elif isinstance(error, RunError):
            console.print(hint, soft_wrap=True)
        raise
    write_report(folder, config, result)
    show_result(console, config, result, folder)
    return result


def _told(console: Console, asked: RunConfig, fits: RunConfig) -> RunConfig:
    """The configuration that fits the sites' budgets, after saying how it differs from what was asked."""
    if fits != asked:
        rounds, noise = fits.federation.num_rounds, fits.privacy.noise_multiplier
        console.print(f"The sites' budgets have room for {rounds} rounds at noise multiplier {noise:g}.")
    return fits


def _folder(config: RunConfig) -> Path:
    """The run's folder; it must be new, or the one to resume with the same configuration."""
    if config.resume is None:
        folder = Path(config.tracking.output_dir) / config.name
        if folder.exists():
            raise ConfigError("name", config.name, f"is taken: {folder} exists; choose another, or resume={folder}")
        return folder
    folder = Path(config.resume)
    saved = saved_config(folder)
    if saved.digest() != config.digest():
        differences = ", ".join(_differences(saved.decisive(), config.decisive()))
        raise ConfigError("resume", config.resume, f"was made with another configuration ({differences})")
    return folder


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key in (key for key in old if old[key] != new.get(key)):
        if isinstance(old[key], dict) and isinstance(new.get(key), dict):
            yield from _differences(old[key], new[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key} was {reprlib.repr(old[key])}, is {reprlib.repr(new.get(key))}"


def _make(folder: Path, config: RunConfig) -> None:
    """Make the run folder, with its configuration in it."""
    try:
        folder.mkdir(parents=True)
        write_config(config, folder)
    except FileExistsError:
        raise ConfigError("name", config.name, f"is taken: {folder} exists; choose another") from None
    except OSError as error:
        bound = f"must be a folder to write {config.name} into ({error.strerror})"
        raise ConfigError("tracking.output_dir", config.tracking.output_dir, bound) from None


def _remove(folder: Path) -> None:
    for name in ("checkpoints", "sites"):  # without a checkpoint no site was asked, so no ledger has begun
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("config.yaml", "log.txt"):
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Keep two processes from running one folder: their ledgers and checkpoints would mix."""
    with (folder / "log.txt").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError("resume", str(folder), "is running in another process") from None
        yield


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

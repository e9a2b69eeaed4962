"""A run's folder on disk while a command runs it: made, locked, logged to, and cleared away where nothing began."""

from __future__ import annotations

import fcntl
import logging
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fedtune.api.compose import write_config
from fedtune.cli.command import InterruptTold, importing
from fedtune.cli.sections import say
from fedtune.config import RunConfig, saved_config
from fedtune.federation.run_folder import RunFolder
from fedtune.privacy.durable import full_disk
from fedtune.spec import ConfigError, RunError, StuckError, shown

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from fedtune.cli.display import Display
    from fedtune.federation.lead import LeadState
    from fedtune.federation.results import RunResult

Work = Callable[[RunConfig, Path, "Display"], "RunResult"]
"""Runs a configuration in its folder, and shows it."""


def run_in_folder(
    config: RunConfig, folder: Path, console: Console, *, work: Work, again: str, began: float
) -> RunResult:
    """Run in a folder, which is made unless a run is resumed, with a report at the end.

    Args:
        config: the run's.
        folder: its own; removed again where nothing had begun.
        console: where progress and result are shown.
        work: the run.
        again: the command that continues it.
        began: when it began, by `time.monotonic`, before libraries that take seconds to load.
    """
    from fedtune.cli.display import Display, show_result
    from fedtune.report.page.unfinished import UnfinishedReport
    from fedtune.tracking import Tracked

    def note(text: str) -> None:
        say(text, style="yellow", console=console)

    page = UnfinishedReport(folder, config)
    made: list[Path] = []
    try:
        with Tracked(config, note=note) as tracked:

            def follow(state: LeadState) -> None:
                tracked.update(state)
                page.update(state)

            display = Display(console, config, shown=config.tracking.progress, follow=follow)
            with _interrupted_by_signals():
                if config.resume is None:
                    made = make(folder, config)
                with only_one(folder), _log_to(RunFolder(folder).log, config.tracking.log_level), display:
                    tracked.begin()
                    result = work(config, folder, display)
            # Scores are shown before anything else is written: there may be no room for it.
            show_result(console, config, result, whole_s=display.earlier_s + time.monotonic() - began)
            from fedtune.report.model_card import write_card
            from fedtune.report.page.render import write_report  # draws, which takes a second to import

            write_card(folder, write_report(folder, language=config.report.language))
            tracked.finish(result, folder)
    except BaseException as error:
        begun = bool(RunFolder(folder).saved_checkpoints)
        if made and not begun:
            _remove(made)  # nothing ran: leave nothing behind
        hint = f"Continue with: {again}" if begun else "Nothing had been trained yet."
        if isinstance(error, KeyboardInterrupt):
            say(f"\nInterrupted. {hint}", console=console)
        elif full_disk(error) or (isinstance(error, RunError) and not isinstance(error, StuckError)):
            say(hint, console=console)
        if begun:
            page.stop()
        if isinstance(error, KeyboardInterrupt):
            raise InterruptTold from error
        raise
    say(f"run folder: {folder}\nreport:     {folder / 'report.html'}", console=console)
    return result


def run_simulation(config: RunConfig, folder: Path, console: Console, *, again: str = "") -> RunResult:
    """Run a simulation in its folder, new or begun.

    Args:
        config: the run's.
        folder: its own.
        console: where progress and result are shown.
        again: the command that continues it; empty: one that resumes this run alone.
    """
    began = time.monotonic()
    # Here, because torch and Flower take seconds to import and a mistake in an override should not wait for them.
    with importing():
        from fedtune.flower.simulation import simulate
        from fedtune.sites.virtual_site import fitted

    if config.resume is None:
        config = told(console, config, fitted(config, folder))
    again = again or f"fedtune simulate resume={folder}"
    return run_in_folder(config, folder, console, work=simulate, again=again, began=began)


def folder_of(config: RunConfig) -> Path:
    """The run's folder; it must be new, or the one to resume with the same configuration."""
    if config.resume is None:
        folder = Path(config.tracking.output_dir) / config.name
        if folder.exists():
            raise ConfigError("name", config.name, f"is taken: {folder} exists; choose another, or resume={folder}")
        return folder
    folder = Path(config.resume)
    if RunFolder(folder).audit_mark.exists():
        raise ConfigError("resume", config.resume, "is an audit, whose data holds canaries; an audit cannot be resumed")
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
            yield f"{prefix}{key} was {shown(old[key], 30)}, is {shown(new.get(key), 30)}"


def has_begun(folder: Path) -> bool:
    """Whether a run has begun in a folder; what one left that was killed before it had is cleared away.

    Raises:
        ConfigError: a process runs the folder.
    """
    if RunFolder(folder).saved_checkpoints:
        return True
    if RunFolder(folder).config.is_file():
        with only_one(folder):
            shutil.rmtree(folder)  # without a checkpoint no site was asked, so no ledger has begun
    return False


def make(folder: Path, config: RunConfig) -> list[Path]:
    """Make the run folder, with its configuration in it.

    Returns:
        The folders that were made: the run's, then those around it.
    """
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True)
        write_config(config, folder)
    except FileExistsError:
        raise ConfigError("name", config.name, f"is taken: {folder} exists; choose another") from None
    except OSError as error:
        _remove(new)
        bound = f"must be a folder to write {config.name} into ({error.strerror})"
        raise ConfigError("tracking.output_dir", config.tracking.output_dir, bound) from None
    return new


def told(console: Console, asked: RunConfig, fits: RunConfig) -> RunConfig:
    """The configuration that fits the sites' budgets, after saying how it differs from what was asked."""
    if fits != asked:
        rounds, noise = fits.federation.num_rounds, fits.privacy.noise_multiplier
        console.print(f"The sites' budgets have room for {rounds} rounds at noise multiplier {noise:g}.")
    return fits


def _remove(made: Sequence[Path]) -> None:
    """Remove what `make` made: a run's folder whole, and those around it as long as nothing else is in them."""
    folder, *parents = made
    shutil.rmtree(folder, ignore_errors=True)  # without a checkpoint no site was asked, so no ledger has begun
    with suppress(OSError):
        for parent in parents:
            parent.rmdir()


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Let SIGTERM end a run as Ctrl-C does; both also in a background process, for which the shell ignores Ctrl-C's."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {each: signal.signal(each, interrupt) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Keep two processes from running one folder: their ledgers and checkpoints would mix."""
    with RunFolder(folder).log.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError("resume", str(folder), "is running in another process") from None
        yield


def is_running(folder: Path) -> bool:
    """Whether a process holds the folder; changes nothing in it."""
    path = RunFolder(folder).log
    if not path.is_file():
        return False
    with path.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


class _LogFile(logging.FileHandler):
    """A log that a full disk keeps from growing; that ends no run, and prints nothing.

    Attributes:
        full: what a simulated site had no room for; it tells the lead no more than that it failed.
    """

    full: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        self.full = self.full or full_disk(record.exc_info and record.exc_info[1])
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def _log_to(path: Path, level: str) -> Iterator[None]:
    """Send fedtune's and Flower's log to a file; the terminal shows the run's progress only."""
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    loggers = [logging.getLogger(name) for name in ("fedtune", "flwr")]
    before = [(logger.level, logger.handlers[:], logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
    try:
        yield
    except RunError as error:
        if handler.full is None or isinstance(error, StuckError) or full_disk(error):
            raise
        raise RunError(f"{error}; {handler.full}") from error
    finally:
        handler.close()
        for logger, (old_level, handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(old_level)

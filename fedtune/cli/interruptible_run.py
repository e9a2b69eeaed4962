"""Runs with terminal progress that can be interrupted by signals and resumed."""

from __future__ import annotations

import io
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.text import Text

from fedtune.api.public import Work, run_in_folder, run_public_stage
from fedtune.cli.command import ReportedInterrupt, pause_garbage_collection
from fedtune.config import RunConfig
from fedtune.federation.early_stopping import explain_exhausted_plan
from fedtune.federation.run_folder import RunFolder
from fedtune.lab.studies.trials import SearchTrial, Trials, describe_price
from fedtune.ops.files import handle_signals
from fedtune.privacy.accountant import format_epsilon
from fedtune.runs.results import RunResult
from fedtune.show.terminal_tables import print_json, say, show
from fedtune.sites.run_cache import RunCache
from fedtune.spec import RunError, StuckError, describe_full_disk
from fedtune.system import send_signal


def show_run(config: RunConfig, folder: Path, console: Console, *, work: Work, again: str, began: float) -> RunResult:
    """Execute a run in its folder, and display its progress and result.

    Args:
        config: the run's configuration.
        folder: the run folder.
        console: the terminal.
        work: function that trains.
        again: the command that resumes the run.
        began: start of the command, by `time.monotonic`.
    """
    from fedtune.show.run_progress import Display, show_result

    display = Display(console, config, shown=config.tracking.progress)

    def run_with_display(config: RunConfig, folder: Path, listener: Any) -> RunResult:
        with display.show_progress_bar():
            result = work(config, folder, listener)
        # Print this before writing more files, because the disk may be full.
        show_result(console, config, result, whole_s=display.earlier_s + time.monotonic() - began)
        return result

    try:
        with _interrupt_on_signals():
            result = run_in_folder(config, folder, display, work=run_with_display)
    except BaseException as error:
        begun = bool(RunFolder(folder).saved_checkpoints)
        hint = f"Continue with: {again}" if begun else "Nothing has been trained yet."
        if isinstance(error, KeyboardInterrupt):
            say(f"\nInterrupted. {hint}", console=console)
            raise ReportedInterrupt from error
        if describe_full_disk(error) or (isinstance(error, RunError) and not isinstance(error, StuckError)):
            say(hint, console=console)
        raise
    say(f"run folder: {folder}\nreport:     {folder / 'report.html'}", console=console)
    return result


def run_simulation(
    config: RunConfig, folder: Path, console: Console, *, cache: RunCache | None = None, again: str | None = None
) -> RunResult:
    """Start or resume a simulation in its folder, and display its progress and result.

    `again` is the command that resumes the run (default: `fedtune simulate resume=FOLDER`).
    """
    began = time.monotonic()
    # Imported late: torch and Flower take seconds, and an invalid override should fail immediately.
    with pause_garbage_collection():
        from fedtune.flower.simulation import simulate
        from fedtune.sites.virtual_site import fit_to_budgets, fix_number_format

    config = fix_number_format(config, folder, alone=cache is not None, told=partial(say, console=console))
    if config.resume is None:
        config = print_fitted_plan(console, config, fit_to_budgets(config, folder))
    again = again or f"fedtune simulate resume={folder}"
    return show_run(config, folder, console, work=partial(simulate, cache=cache), again=again, began=began)


def run_displayed_public_stage(config: RunConfig, console: Console, *, again: Sequence[str]) -> RunConfig:
    """Run a pending public stage with a progress display, and return the configuration that starts from its adapter.

    `again` is the command that resumes the stage.
    """
    named = [] if any(word.startswith("name=") for word in again) else [f"name={config.name}"]

    def train(stage: RunConfig, folder: Path) -> None:
        about = f"Public stage: the lead alone trains on {config.public.train_file}, which you declared to contain"
        say(f"{about} public records, without privacy. The sites start from the resulting adapter.", console=console)
        run_simulation(stage, folder, console, again=shlex.join(["fedtune", *again, *named]))
        say("The public stage is finished: the run itself starts.", console=console)

    return run_public_stage(config, train)


def print_fitted_plan(console: Console, asked: RunConfig, fits: RunConfig) -> RunConfig:
    """Print what differs in `fits`, the plan within the sites' budgets and policies, from `asked`."""
    rounds, noise = fits.federation.num_rounds, fits.privacy.noise_multiplier
    if (rounds, noise) != (asked.federation.num_rounds, asked.privacy.noise_multiplier):
        console.print(f"The sites' budgets allow {rounds} rounds at noise multiplier {noise:g}.")
    if (ranks := fits.federation.site_ranks) != asked.federation.site_ranks:
        console.print(f"The sites' policies allow these ranks: {', '.join(f'{one} {r}' for one, r in ranks.items())}.")
    return fits


def run_with_summary(trial: SearchTrial, *, console: Console, name: str, cache: RunCache) -> RunResult:
    """Run a trial of a sweep or search, and print its result in one line.

    During the run, a terminal shows the latest progress line.  The trial's folder contains the details.
    """
    began = time.monotonic()
    with console.status(f"{name} ...") as status:

        def show_newest_line(text: str) -> None:
            for line in text.split("\n")[-2:-1]:
                status.update(Text(f"{name}: {line.strip()}"[: console.width - 3]))

        lines: Any = SimpleNamespace(write=show_newest_line, flush=io.StringIO().flush)
        unseen = Console(file=lines, width=10 * console.width)
        result = run_simulation(trial.config, trial.folder, unseen, cache=cache)
    scores = [f"test {kind} {value:.3f}" for kind, value in result.final.metrics.items() if value is not None]
    said = (code.replace("_", " ") for code in result.final.findings)
    parts = [*scores[:1], f"epsilon {format_epsilon(result.privacy.epsilon)}", *said]
    say(f"{name}: {', '.join(parts)}, {time.monotonic() - began:.0f} s", console=console)
    if missing := explain_exhausted_plan(result.rounds, trial.config.federation):
        say(f"{name}: {missing}.", console=console)
    return result


@contextmanager
def show_several_runs(
    trials: Trials, console: Console, *, again: Sequence[str], as_json: bool = False
) -> Iterator[None]:
    """Print the total privacy cost of several runs on entry, and the table of results on exit or after an error."""
    for text in describe_price({folder.name: trial for folder, trial in trials.rows.items()}):
        say(text, console=console)
    try:
        yield
    finally:
        if as_json:
            print_json(trials.to_json())
        else:
            show_trials(console, trials, again=shlex.join(["fedtune", *again]))


def show_trials(console: Console, trials: Trials, *, again: str) -> None:
    """Print the results table of several runs, the best run's folder, the table's file, and the command to resume."""
    show([table := trials.section()], console=console)
    if (best := trials.best) is not None:
        say(f"{'picked:' if table.title == 'Trials' else 'best: '} {best.folder}", console=console)
    if trials.table.is_file():
        say(f"table: {trials.table} (every score, and each run's folder)", console=console)
    if any(trial.can_resume for trial in trials.rows.values()):
        say(f"Continue the {'search' if table.title == 'Trials' else 'sweep'} with: {again}", console=console)


@contextmanager
def _interrupt_on_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM and SIGINT, also in background jobs, for which shells ignore SIGINT.

    Python discards exceptions in `__del__` and in weak reference callbacks, so a discarded interrupt is raised again.
    """

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    def reraise_interrupt(about: sys.UnraisableHookArgs) -> None:
        if about.exc_type is KeyboardInterrupt:
            threading.Timer(0.01, send_signal, (os.getpid(), signal.SIGINT)).start()
        else:
            hook(about)

    with handle_signals(interrupt):
        hook, sys.unraisablehook = sys.unraisablehook, reraise_interrupt
        try:
            yield
        finally:
            sys.unraisablehook = hook

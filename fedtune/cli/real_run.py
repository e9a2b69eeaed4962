"""Implementation of `fedtune run`: start, status, stop and resume of runs over real sites."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from fedtune.api.compose import compose_run, quote_word
from fedtune.cli.command import print_answer
from fedtune.cli.interruptible_run import print_fitted_plan, run_displayed_public_stage, show_run, show_several_runs
from fedtune.cli.run_settings import compose_for_sites
from fedtune.config import RunConfig, read_saved_config
from fedtune.federation.early_stopping import should_stop
from fedtune.federation.lead import Checkpoints, compute_site_charge
from fedtune.federation.run_folder import RunFolder
from fedtune.federation.spec import FederationSpec
from fedtune.lab.studies.trials import Trials
from fedtune.ops.kits.kit_file import Kit
from fedtune.ops.services.lead_and_server import (
    find_run_name,
    find_running_process,
    list_federation_settings,
    read_latest_answers,
)
from fedtune.privacy.accountant import format_epsilon
from fedtune.runs.results import RunResult
from fedtune.runs.run_paths import find_run_folder, is_finished
from fedtune.show.terminal_tables import Section, say
from fedtune.spec import NOT_GIVEN, ConfigError, RunError
from fedtune.system import send_signal

_STOP_S = 60.0


def begin_run(
    words: Sequence[str], *, kit: Path | None, renew: Path | None, multirun: bool, or_resume: bool, metrics: str | None
) -> None:
    """Start a run or a sweep.  The arguments are those of `fedtune run`.

    Raises:
        ConfigError: a setting or an argument is invalid.
    """
    words = words if renew is None else (*words, f"renew={quote_word(str(renew))}")
    # A service always starts with the same words.  A run that has begun keeps its settings and sites.
    if or_resume:
        if not any(word.startswith("name=") for word in words):
            raise ConfigError("name", NOT_GIVEN, "is required with --or-resume: set a fixed name for the run")
        # Only its folder is needed here; settings that depend on the number of sites come later.
        of_sites = ("sites=", "federation.", "data.declared_sizes=")
        asked = compose_run([*(one for one in words if not one.startswith(of_sites)), "data.declared_sizes=2"])
        folder = Path(asked.tracking.output_dir) / asked.name
        if RunFolder(folder).has_begun():
            if is_finished(folder):
                say(f"{folder} is finished.")
                return
            words = (f"resume={quote_word(str(folder))}",)
    lead = _read_lead_kit(kit)
    if not multirun:
        start_run(words, kit=lead, metrics=metrics)
        return
    trials = Trials.from_sweep(words, partial(compose_for_sites, kit=lead))
    again = ["run", "--kit", str(lead.folder), "-m", *trials.again]
    with show_several_runs(trials, Console(), again=again):
        trials.run(lambda trial: _start_or_resume(trial.config, again, kit=lead, metrics=metrics))


def resume_run(words: Sequence[str], *, kit: Path | None, metrics: str | None) -> None:
    """Resume the run in the folder `words[0]` with the remaining words as overrides."""
    folder, settings = _parse_run_folder("resume", words), words[1:]
    start_run([f"resume={quote_word(str(folder))}", *settings], kit=_read_lead_kit(kit), metrics=metrics)


def _parse_run_folder(action: str, words: Sequence[str]) -> Path:
    if not words:
        raise ConfigError("run folder", NOT_GIVEN, f"is required: fedtune run {action} FOLDER")
    return Path(words[0])


def _read_lead_kit(folder: Path | None) -> Kit:
    if folder is None:
        raise ConfigError("--kit", NOT_GIVEN, "is required: the folder of the lead's kit")
    return Kit.read(folder, kind="lead")


def start_run(
    words: Sequence[str], *, kit: Kit, metrics: str | None = None, over: Callable[..., Any] | None = None
) -> None:
    """Start or resume a run over fedtune's HTTPS connections, or over a Flower Grid if `over` is given."""
    # Checked before the slow import of torch and Flower, so that an invalid setting fails immediately.
    again = ["run", "--kit", str(kit.folder), "--or-resume", *words]
    _start_or_resume(compose_for_sites(words, kit=kit), again, kit=kit, metrics=metrics, over=over)


def _start_or_resume(
    config: RunConfig,
    same_again: Sequence[str],
    *,
    kit: Kit,
    metrics: str | None,
    over: Callable[..., Any] | None = None,
) -> RunResult:
    began = time.monotonic()
    if over is None:
        kit.check_certificate(datetime.now(UTC))
    config = run_displayed_public_stage(config, console := Console(), again=same_again)
    folder = find_run_folder(config)
    # Imported before the run's log replaces the log handlers that the import of Flower installs.
    from fedtune.ops.deployment import LeadService
    from fedtune.ops.metrics import serve_metrics

    lead = LeadService(kit=kit, federation=config.federation, over=over)
    with serve_metrics(metrics, lead.metrics.collect_values):
        if config.resume is None:
            config = print_fitted_plan(console, config, lead.fit_to_budgets(config))
        again = f"fedtune run resume {folder} --kit {kit.folder}"
        if over is not None:
            again = f'flwr run, with settings = ["resume={folder}"] in the run\'s file'
        return show_run(config, folder, console, work=lead.run, again=again, began=began)


def stop_run(words: Sequence[str], *, kit: Path | None, for_good: bool) -> None:
    """Stop the run in the folder `words[0]`, and with `for_good` also end it at its sites.

    Raises:
        ConfigError: the run folder or the lead's kit is missing.
        RunError: the run's process is unknown, or did not stop in time.
    """
    folder = _parse_run_folder("stop", words)
    lead = _read_lead_kit(kit) if for_good else None
    files = RunFolder(folder)
    if lead is not None and not files.config.is_file():
        # the folder is lost: the lead's key is enough
        _end_run_at_sites(find_run_name(lead, str(folder)), list_federation_settings(lead), kit=lead)
        return
    config = read_saved_config(folder)
    if files.is_running:
        if (pid := find_running_process(folder)) is None:
            where = "stop the run on the machine where it was started"
            raise RunError(f"{folder} is running, but its process is unknown: {where}")
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            send_signal(pid, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_S
        while files.is_running:
            if time.monotonic() > deadline:
                raise RunError(f"process {pid} has not stopped within {_STOP_S:g} s: it may be finishing an evaluation")
            time.sleep(0.2)
        say(f"{folder} is stopped; `fedtune run resume {folder} --kit ...` resumes it.")
    else:
        say(f"{folder} is not running.")
    if lead is not None:
        from fedtune.sites.shared_settings import select_settings_for_sites  # torch takes seconds to import

        _end_run_at_sites(select_settings_for_sites(config).run_id(), config.federation, kit=lead)


def _end_run_at_sites(run: str, federation: FederationSpec, *, kit: Kit) -> None:
    from fedtune.ops.deployment import LeadService

    current = list_federation_settings(kit)
    there = tuple(site for site in federation.active if site in current.active)  # others were revoked since
    asked = federation if there == federation.active else replace(current, num_sites=len(there), site_names=there)
    heard = LeadService(kit=kit, federation=asked).announce_end(run, timeout_s=30.0) if there else []
    say(f"Sites that were notified of the end of the run: {', '.join(heard) or 'no site'}.")
    if silent := [site for site in federation.active if site not in heard]:
        say(f"Not reached: {', '.join(silent)}; their budget is released when the run expires.")


def print_status(words: Sequence[str], *, kit: Path | None, as_json: bool) -> None:
    """Print the progress and each site's spending of the run in the folder `words[0]`.

    Without a folder, list the sites that are online.
    """
    if not words and kit is not None:
        from fedtune.ops.deployment import LeadService

        lead = _read_lead_kit(kit)
        online = LeadService(kit=lead, federation=list_federation_settings(lead)).list_online_sites()
        now = [(site, "online" if there else "no response") for site, there in online.items()]
        section = Section(headings=("site", "now"), rows=now, words=range(2))
        print_answer({"online": online}, [section], as_json=as_json)
        return
    folder = _parse_run_folder("status", words)
    config = read_saved_config(folder)
    state = Checkpoints(RunFolder(folder).checkpoints, config.digest()).load()
    plan, answers, sites, rows = config.plan(), read_latest_answers(folder), dict[str, dict[str, Any]](), []
    over = should_stop(state.rounds, config.federation, primary_metric=config.primary_metric)
    for site in config.federation.active:
        charge, last = compute_site_charge(state, site, plan), answers.get(site, {})
        what, at = last.get("what", "none yet"), last.get("time")
        epsilon = charge.proven_epsilon if over else charge.epsilon  # None: nothing bounds the loss
        sites[site] = {"last_answer": what, "at": at, "epsilon": epsilon}
        sites[site] |= {"rounds_charged": charge.rounds, "upper_bound": charge.upper_bound}
        rows.append((site, what, at or "-", f"{format_epsilon(epsilon)}{' at most' if charge.upper_bound else ''}"))
    status: dict[str, Any] = {"name": config.name, "running": RunFolder(folder).is_running, "finished": over}
    status |= {"round": state.round, "num_rounds": config.federation.num_rounds}
    status |= {"metrics": dict(state.rounds[-1].metrics) if state.rounds else {}, "sites": sites}
    how = "running" if status["running"] else "finished" if status["finished"] else "stopped"
    heading = f"{folder}: {how}, {status['round']} of {status['num_rounds']} rounds are done"
    section = Section(headings=("site", "last answer", "at", "epsilon so far"), rows=rows, words=range(4))
    print_answer(status, [section], as_json=as_json, heading=heading)

"""Terminal display of a run: settings, progress, finished rounds, and the result."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from fedtune.config import RunConfig
from fedtune.federation.early_stopping import (
    SelectedRound,
    count_rounds,
    explain_exhausted_plan,
    select_round,
    should_stop,
)
from fedtune.federation.lead import LeadState, compute_charged_epsilons, compute_site_charge
from fedtune.federation.planner import compute_signal_to_noise
from fedtune.formatting import convert_none_to_infinite, format_size, pluralize
from fedtune.model.frozen_linear import is_slow_on_cpu
from fedtune.model.ranks import count_trained_values
from fedtune.privacy.accountant import format_epsilon
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.run_plan import Plan
from fedtune.runs.lineage import PRIVATE_BASES, UNKNOWN
from fedtune.runs.results import DATA_CHANGED, DIVERGED, GUESS, WORSE, RunResult
from fedtune.show.budget_text import ABOUT_RDP, WEAK_SIGNAL, describe_noise, explain_signal
from fedtune.show.terminal_tables import Section, build_key_value_section, say, show
from fedtune.sites.shared_model import RunModel


class Display:
    """Run listener that prints one line per round, and a progress bar with the remaining time.

    Without a terminal, the progress bar is replaced by progress lines.

    Args:
        console: the output.
        config: the run's configuration.
        shown: whether to print progress; False: print only the result.
        every_s: minimum interval of progress lines in seconds, without a terminal.

    Attributes:
        earlier_s: duration of the run in seconds before it was resumed.
    """

    def __init__(self, console: Console, config: RunConfig, *, shown: bool, every_s: float = 15.0) -> None:
        self._console, self._config, self._shown, self._every_s = console, config, shown, every_s
        self.earlier_s = 0.0
        self._plan: Plan | None = None
        self._done = 0
        self._task: TaskID | None = None
        self._preparing: TaskID | None = None
        self._stage, self._stage_began, self._first, self._told = "", 0.0, 0, 0.0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TimeElapsedColumn(),
            TextColumn("elapsed"),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            disable=not shown or not console.is_terminal,
        )

    @contextmanager
    def show_progress_bar(self) -> Iterator[None]:
        """Print the start message, and display the progress bar until the end of the block."""
        if self._shown:
            self._console.print(f"[bold]fedtune[/bold] {self._config.name}: loading model and data ...")
        with self._progress:
            yield

    def on_preparing(self, what: str, done: int, total: int) -> None:
        """Display the progress of slow preparation, as a bar or as progress lines."""
        now, new = time.monotonic(), what != self._stage
        if new or not self._first:  # the first step includes one-time work, and is not representative
            self._stage, self._stage_began, self._first = what, now, done
        so_far = f"{what}: {done:,} of {total:,}" if done else f"{what} ..."
        since = done - self._first
        left = _format_time_left((total - done) * (now - self._stage_began) / since if since > 0 else None)
        if self._console.is_terminal:
            if new or 0 < total <= done:
                self._remove_preparation_bar()
            if done < total or not total:
                if self._preparing is None:
                    self._preparing = self._progress.add_task(so_far, total=None, left="")
                self._progress.update(
                    self._preparing, description=so_far, completed=done, total=total or None, left=left
                )
                self._progress.refresh()
        elif self._shown and ((new and self._plan is None) or now - self._told >= self._every_s):
            self._console.print(f"  {so_far}{left and f', {left}'}")
            self._told = now

    def _remove_preparation_bar(self) -> None:
        if self._preparing is not None:
            self._progress.remove_task(self._preparing)
            self._preparing = None

    def note(self, text: str) -> None:
        """Print a warning about a probable mistake in the data."""
        self._print_text(f"Note: {text}", style="yellow")

    def _print_text(self, text: str, *, style: str = "") -> None:
        if self._shown:
            say(text, style=style, console=self._console)

    def on_prepared(self, shared: RunModel, proposal: Proposal, state: LeadState) -> None:
        """Print the settings of the run before the first round."""
        federation = self._config.federation
        self._plan, self._done = proposal.plan, state.round * len(federation.active)
        self.earlier_s = state.seconds
        self._remove_preparation_bar()
        if self._shown:
            show([_build_settings_section(self._config, shared, proposal.plan)], console=self._console)
        if state.start_adapter:
            self._print_text(f"starts from {_describe_start(state.start_adapter)}")
        if state.metrics_before:
            self._print_text(f"before training: {_format_scores(state.metrics_before)} (test records)")
        if state.round:
            over = should_stop(state.rounds, federation, primary_metric=self._config.primary_metric)
            self._print_text(f"{'the run had ended' if over else 'resuming'} after round {state.round}")
        total, left = federation.num_rounds * len(federation.active), self._estimate_time_left(state)
        said = self._format_round(state.round + 1, 0)
        self._task = self._progress.add_task(said, total=total, completed=self._done, left=left)

    def on_site_replied(self, number: int) -> None:
        """Advance the progress bar by one site."""
        if self._task is not None:
            said = self._format_round(self._done // len(self._config.federation.active) + 1, number)
            self._progress.update(self._task, completed=self._done + number, description=said)

    def on_site_answered(self, site: str, what: str, *, num_bytes: int, charged_rounds: int | None) -> None:
        """Print a real site's reply with the epsilon of its receipt."""
        text = f"{what}, {format_size(num_bytes)}" if what == "update" else what
        if charged_rounds is not None and self._plan is not None:
            text += f", epsilon {format_epsilon(compute_charged_epsilons(self._plan, charged_rounds)[0])}"
        self._print_text(f"  {site}: {text}", style="" if what == "update" else "yellow")

    def on_round_finished(self, state: LeadState) -> None:
        """Print the line of a finished round, which is wrapped only at separators on a narrow terminal."""
        self._done = state.round * len(self._config.federation.active)
        if self._task is not None:
            said, left = self._format_round(state.round + 1, 0), self._estimate_time_left(state)
            self._progress.update(self._task, completed=self._done, description=said, left=left)
        if not self._shown:
            return
        line = Text()
        for text, style in self._iter_round_parts(state):
            if line and line.cell_len + len(text) + 3 > self._console.width:
                self._console.print(line, soft_wrap=True)
                line = Text("  ")
            elif line:
                line.append(" | ")
            line.append(text, style=style)
        self._console.print(line, soft_wrap=True)

    def _iter_round_parts(self, state: LeadState) -> Iterator[tuple[str, str]]:
        """Yield the parts of a round's line as (text, style)."""
        assert self._plan is not None
        federation, last = self._config.federation, state.rounds[-1]
        rounds = count_rounds(state.rounds, federation)
        yield f"round {last.round:>{len(str(rounds))}}/{rounds}", ""
        yield f"{len(last.sites)}/{len(federation.active)} sites", ""
        yield f"validation: {_format_scores(last.metrics)}" if last.metrics else "no validation records", ""
        kept = select_round(state.rounds, federation, primary_metric=self._config.primary_metric)
        over = should_stop(state.rounds, federation, primary_metric=self._config.primary_metric)
        charges = (compute_site_charge(state, site, self._plan) for site in federation.active)
        epsilons = (convert_none_to_infinite(one.proven_epsilon if over else one.epsilon) for one in charges)
        yield f"epsilon {format_epsilon(max(epsilons))}", ""
        yield f"{last.seconds:.1f} s", ""
        if kept is not None and kept.round < last.round:
            yield f"best so far: round {kept.round}", ""
        # Extrapolate from this run's rounds, so that a log without a progress bar has an estimate as well.
        left = self._estimate_time_left(state)
        if left and not over:
            yield left, ""
        if last.diverged:
            yield "diverged: the previous adapter is restored", "red"
        for site, reason in last.failed_sites.items():
            yield f"{site}: {reason}", "red"

    def _estimate_time_left(self, state: LeadState) -> str:
        left = count_rounds(state.rounds, self._config.federation) - state.round
        return _format_time_left(left * (state.seconds_per_round or 0.0))

    def _format_round(self, round: int, replied: int) -> str:
        rounds, sites = self._config.federation.num_rounds, len(self._config.federation.active)
        return f"round {min(round, rounds)}/{rounds}, site {min(replied + 1, sites)}/{sites}"


def _format_time_left(seconds: float | None) -> str:
    return f"about {_format_minutes(seconds)} left" if seconds else ""


def show_result(console: Console, config: RunConfig, result: RunResult, *, whole_s: float) -> None:
    """Print a run's result: privacy spending by site, scores, and the total time `whole_s` in seconds.

    With `tracking.log_level=debug`, also explain the RDP epsilon.
    """
    say_here = partial(say, console=console)
    privacy, final = result.privacy, result.final
    rows, sizes = [], config.declared_sizes()
    for site, spent in privacy.sites.items():
        steps = f"{spent.steps}{' at most' if spent.upper_bound else ''}"
        rows.append((site, f"{sizes[site]:,}", steps, *map(format_epsilon, (spent.epsilon, spent.epsilon_rdp))))
    headings = ("site", "declared size", "steps", "epsilon", "epsilon by RDP")
    explained = config.tracking.log_level == "debug" and privacy.epsilon is not None
    notes = [ABOUT_RDP.format(counts="epsilon")] if explained else []
    show([Section("Privacy spending by site", headings, rows, notes=notes)], console=console)
    if privacy.epsilon is None:
        say_here("No privacy guarantee: this run added no noise.", style="yellow")
    elif not privacy.seeded_noise:
        say_here(f"epsilon {format_epsilon(privacy.epsilon)} at delta {privacy.delta:g} for each {privacy.unit}")
    if privacy.seeded_noise:
        say_here("A study without a guarantee: its noise came from the configured seed.", style="yellow")
    if measured := [one for one in result.rounds if one.site_scores]:
        # The latest scores that the sites released and charged.
        about = f"noised scores of held-out {privacy.unit}s, for the adapter at the start of round {measured[-1].round}"
        scores = (f"{site} {values[0]:.3f}" for site, values in measured[-1].site_scores.items())
        say_here(f"{about}: {', '.join(scores)}")
    if final.selected_round is not None:
        planned = count_rounds(result.rounds, config.federation)
        say_here(_describe_selected_round(final.selected_round, result, planned=planned))
    if final.metrics:
        before = f" (before: {_format_scores(final.metrics_before)})" if final.metrics_before else ""
        say_here(f"test: {_format_scores(final.metrics)}{before}", style="bold")
        if final.constant is not None:
            say_here(f"best constant answer: {_format_scores({config.primary_metric: final.constant})}")
    if missing := explain_exhausted_plan(result.rounds, config.federation):
        say_here(f"{missing}.", style="yellow")
    for code in final.findings:
        say_here(_describe_finding(code, config), style="yellow")
    took = f"training and scoring: {_format_minutes(final.seconds or 0.0)}; with loading: {_format_minutes(whole_s)}"
    memory = f", peak memory {final.peak_memory_bytes / 2**30:.1f} GiB" if final.peak_memory_bytes else ""
    say_here(took + memory)


def _describe_selected_round(kept: SelectedRound, result: RunResult, *, planned: int) -> str:
    """Describe the round of the selected checkpoint, and the effect of early stopping on epsilon."""
    score = _format_scores({kept.primary_metric: kept.score})
    text = f"selected: the adapter of round {kept.round} of {len(result.rounds)} (validation {score})"
    if not kept.stopped_early:
        return text
    privacy = result.privacy
    text += f"; no later round was better, so the run ended {pluralize(planned - len(result.rounds), 'round')} early"
    if privacy.epsilon is None:
        return text
    charged = format_epsilon(max(convert_none_to_infinite(site.epsilon) for site in privacy.sites.values()))
    claim = f"the guarantee is the planned {format_epsilon(privacy.epsilon)}, because scores determined the end"
    return f"{text}. The sites were charged epsilon {charged}; {claim}"


def _describe_finding(code: str, config: RunConfig) -> str:
    """Describe a problem in training, with a remedy."""
    rates = config.training.suggest_lower_rates(clipped=config.privacy.private)
    lower = " ".join(f"training.{key}={rate:g}" for key, rate in rates.items())
    page = "(docs/own_data.md, When scores are low)"
    texts = {
        DATA_CHANGED: "A training file changed between two starts of this run.",
        DIVERGED: f"Training diverged: do not use this adapter. The learning rates are too high; try {lower} {page}.",
        WORSE: "The model is worse than before training. Noise or a too high learning rate outweighed the records' "
        f"signal; try {lower}, or more records {page}.",
        GUESS: f"The model is no better than a constant answer. There may be too few records for this noise {page}.",
    }
    return texts[code]


def _build_settings_section(config: RunConfig, shared: RunModel, plan: Plan) -> Section:
    """Build the table of a run's settings, with warnings in yellow."""
    steps = f"{pluralize(plan.num_rounds, 'round')} x {pluralize(plan.local_steps, 'step')}"
    trained, warnings = shared.initial_adapter.num_values, set[str]()
    sizes = ", ".join(f"{site} {size:,}" for site, size in config.declared_sizes().items())
    rows = {
        "model": f"{config.model.path}, {trained:,} trained parameters, on {shared.device}",
        "data": f"{config.data.dataset}, declared sizes: {sizes}",
        "training": f"{steps}, sampling rate {plan.sampling_rate:g}",
    }
    if plan.private:
        epsilon = format_epsilon(compute_charged_epsilons(plan, plan.max_rounds)[0])
        bound = f"epsilon at most {epsilon} at delta {plan.delta:g} for each {plan.unit}"
        rows["privacy"] = f"{bound}: clip {plan.max_grad_norm:g}, noise {describe_noise(plan)}"
        if plan.unit == "user":
            rows["privacy"] += f", at most {pluralize(plan.records_per_user, 'record')} of a user in a step"
        if (people := plan.cohorts) is not None:
            came = f"up to {people.last}, or without a date"
            came = f"from {people.first} to {people.last}" if people.first else came
            rows["people"] = f"only those who arrived {came} are charged"
        if config.runtime.seeded_noise:
            rows["privacy"] += "; seeded noise: a study without a guarantee"
            warnings.add("privacy")
    else:
        rows["privacy"] = "none (privacy=none)"
        warnings.add("privacy")
    if plan.private and trained:
        values = count_trained_values(shared.initial_adapter.tensors, config.federation.site_ranks).values()
        ratio = compute_signal_to_noise(plan, config.declared_sizes(), values=fmean(values))
        rows["signal"] = explain_signal(ratio, config.task)
        warnings |= {"signal"} if ratio < WEAK_SIGNAL else set()
    dtype = config.model.dtype
    if str(shared.device) == "cpu" and is_slow_on_cpu(dtype):
        slower = f"model.dtype={dtype} makes this run slower: this CPU has no bfloat16 instructions"
        rows["format"] = f"{slower}; use model.dtype=float32 here"
    uses = plan.num_rounds * plan.local_steps * plan.sampling_rate  # expected uses of a record
    if not shared.loaded.keeps_states and uses > 1:
        small = "runtime.kept_states_mib is too small to keep the outputs of the frozen layers for all records"
        slower = f"these layers run about {uses:.0f} times for each record"
        slower = f"which takes {math.ceil(shared.states_mib):,} MiB: {slower}"
        rows["memory"] = f"{small}, {slower}. runtime.kept_states_folder, a folder on a fast disk, can store them too"
    styles = {place: "yellow" for place, name in enumerate(rows) if name in warnings | {"format", "memory"}}
    return replace(build_key_value_section(rows), styles=styles)


def _describe_start(about: Mapping[str, Any]) -> str:
    """Describe a run's start adapter and its prior spending."""
    on = "" if about.get("dataset", UNKNOWN) == UNKNOWN else f" on {about['dataset']}"
    if about.get("public"):
        spent = "it was trained without privacy on records declared public"
    elif about["epsilon"] == UNKNOWN:
        spent = f"its training cost is unknown{': no run folder next to it shows it' if 'head' in about else ''}"
    elif about["epsilon"] is None:
        spent = f"its training{on} has no privacy guarantee for its records"
    else:
        epsilon = f"epsilon {format_epsilon(about['epsilon'])} at delta {about['delta']:g} for each {about['unit']}"
        spent = f"its training{on} spent {epsilon}"
    new = "its head has other labels, so the run starts with a new head"
    head: dict[object, str] = {True: "its head is reused", False: new}
    what = "the adapter" if "head" in about else "a base model derived from the adapter"
    start = f"{what} {about['digest'][:12]} of {about['from']}"
    if about["digest"] in PRIVATE_BASES:
        start = f"{about['from']}, pre-trained with privacy, as claimed by its authors"
    return "; ".join(filter(None, (start, spent, head.get(about.get("head")))))


def _format_scores(metrics: Mapping[str, float | None]) -> str:
    texts = {name: "not finite" if value is None else f"{value:.3f}" for name, value in metrics.items()}
    return ", ".join(f"{name.replace('_', '-')} {text}" for name, text in texts.items())


def _format_minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

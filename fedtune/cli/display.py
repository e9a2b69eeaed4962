"""What a person at the terminal sees of a run: settings, rounds as they finish, and the result."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fedtune.config import RunConfig
from fedtune.evaluation.groups import fewest_told, noised_groups
from fedtune.federation.kept_round import Kept, is_over, kept_of, rounds_in_all
from fedtune.federation.lead import LeadState
from fedtune.federation.planner import signal_to_noise
from fedtune.model.products import multiplies_rounded
from fedtune.privacy.accountant import epsilon_text
from fedtune.privacy.mechanism import OTHERS
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.run_plan import Plan
from fedtune.runs.environment import UNKNOWN
from fedtune.runs.results import DATA_CHANGED, DIVERGED, GUESS, WORSE, RunResult, charged_epsilons, site_charge
from fedtune.show.budget_words import ABOUT_RDP, WEAK_SIGNAL, noise_words, signal_words
from fedtune.show.sections import say
from fedtune.sites.shared_model import SharedModel
from fedtune.words import counted, unbounded


class Display:
    """Follows a run on the terminal: one line a round, and a bar with the time left where there is a terminal.

    Args:
        shown: False prints nothing until the result.
        every_s: where there is no terminal, what takes long is told of no more often.

    Attributes:
        earlier_s: how long the run had taken before it was resumed.
    """

    def __init__(
        self,
        console: Console,
        config: RunConfig,
        *,
        shown: bool,
        every_s: float = 15.0,
    ) -> None:
        self._console, self._config, self._shown, self._every_s = console, config, shown, every_s
        self.earlier_s = 0.0
        self._plan: Plan | None = None
        self._done = 0
        self._task: TaskID | None = None
        self._preparing: TaskID | None = None
        self._stage, self._stage_began, self._told = "", 0.0, 0.0
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

    def __enter__(self) -> Display:
        if self._shown:
            self._console.print(f"[bold]fedtune[/bold] {self._config.name}: loading model and data ...")
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def preparing(self, what: str, done: int, total: int) -> None:
        """Show what takes long: on a terminal with a bar, elsewhere as a line now and then."""
        now, new = time.monotonic(), what != self._stage
        if new:
            self._stage, self._stage_began = what, now
        so_far = f"{what}: {done:,} of {total:,}" if done else f"{what} ..."
        left = _left((total - done) * (now - self._stage_began) / done if done else None)
        if self._console.is_terminal:
            self._remove_bar(new or 0 < total <= done)
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

    def _remove_bar(self, over: bool) -> None:
        if over and self._preparing is not None:
            self._progress.remove_task(self._preparing)
            self._preparing = None

    def note(self, text: str) -> None:
        """Say what is seldom meant."""
        if self._shown:
            say(f"Note: {text}", style="yellow", console=self._console)

    def prepared(self, shared: SharedModel, proposal: Proposal, state: LeadState) -> None:
        """Show what is about to run."""
        self._plan, self._done = proposal.plan, state.round * len(self._config.federation.active)
        self.earlier_s = state.seconds
        self._remove_bar(True)
        if self._shown:
            self._console.print(_settings_table(self._config, shared, proposal.plan))
            if state.start_adapter:
                say(f"begins in {_start(state.start_adapter)}", console=self._console)
            if state.metrics_before:
                self._console.print(f"before training: {_scores(state.metrics_before)} (test records)")
            if state.round:
                over = is_over(state.rounds, self._config.federation, judged_by=self._config.judged_by)
                what = "the run was over" if over else "resuming"
                self._console.print(f"{what} after round {state.round}")
            if state.data_changed:
                say(_changed(state.data_changed), style="yellow", console=self._console)
        federation = self._config.federation
        self._task = self._progress.add_task(
            self._round_text(state.round + 1, 0),
            total=federation.num_rounds * len(federation.active),
            completed=self._done,
            left=_left(self._left_s(state)),
        )

    def site_replied(self, number: int) -> None:
        """Move the bar."""
        if self._task is not None:
            finished = self._done // len(self._config.federation.active)
            self._progress.update(
                self._task, completed=self._done + number, description=self._round_text(finished + 1, number)
            )

    def site_answered(self, site: str, what: str, *, num_bytes: int, charged_rounds: int | None) -> None:
        """Say what a real site answered, and what its receipt comes to."""
        if self._shown:
            size = f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.1f} KiB"
            text = f"{what}, {size}" if what == "update" else what
            if charged_rounds is not None and self._plan is not None:
                text += f", epsilon {epsilon_text(charged_epsilons(self._plan, charged_rounds)[0])}"
            say(f"  {site}: {text}", style="" if what == "update" else "yellow", console=self._console)

    def round_finished(self, state: LeadState) -> None:
        """Print the round's line."""
        self._done = state.round * len(self._config.federation.active)
        if self._task is not None:
            said = self._round_text(state.round + 1, 0)
            self._progress.update(self._task, completed=self._done, description=said, left=_left(self._left_s(state)))
        if self._shown:
            self._tell(self._round_parts(state))

    def _tell(self, parts: Sequence[tuple[str, str]]) -> None:
        """Parts of a line, each with its style; one that has no room there begins a new line."""
        line = Text()
        for text, style in parts:
            if line and line.cell_len + len(text) + 3 > self._console.width:
                self._console.print(line, soft_wrap=True)
                line = Text("  ")
            elif line:
                line.append(" | ")
            line.append(text, style=style)
        self._console.print(line, soft_wrap=True)

    def _round_parts(self, state: LeadState) -> list[tuple[str, str]]:
        assert self._plan is not None
        last, rounds = state.rounds[-1], rounds_in_all(state.rounds, self._config.federation)
        charges = [site_charge(state, site, self._plan) for site in self._config.federation.active]
        epsilon = epsilon_text(max(charge.epsilon for charge in charges))
        parts = [
            f"round {last.round:>{len(str(rounds))}}/{rounds}",
            f"{len(last.sites)}/{len(self._config.federation.active)} sites",
            f"validation: {_scores(last.metrics)}" if last.metrics else "no validation records",
            f"epsilon {epsilon}",
            f"{last.seconds:.1f} s",
        ]
        kept = kept_of(state.rounds, self._config.federation, judged_by=self._config.judged_by)
        if kept is not None and kept.round < last.round:
            parts.append(f"kept so far: round {kept.round}")
        notable = []
        if last.diverged:
            notable.append("diverged: back to the adapter before")
        # Rounds still to come at this run's own pace, so that also a log without a bar says how long.
        left = _left(self._left_s(state))
        if left and not (kept is not None and kept.ended_early):
            parts.append(left)
        notable += [f"{site}: {reason}" for site, reason in last.failed_sites.items()]
        return [*((part, "") for part in parts), *((part, "red") for part in notable)]

    def _left_s(self, state: LeadState) -> float | None:
        left = rounds_in_all(state.rounds, self._config.federation) - state.round
        return None if state.pace_s is None else left * state.pace_s

    def _round_text(self, round: int, replied: int) -> str:
        federation = self._config.federation
        site = min(replied + 1, len(federation.active))
        return (
            f"round {min(round, federation.num_rounds)}/{federation.num_rounds}, site {site}/{len(federation.active)}"
        )


def _left(seconds: float | None) -> str:
    return f"about {_duration(seconds)} left" if seconds else ""


def show_result(console: Console, config: RunConfig, result: RunResult, *, whole_s: float) -> None:
    """The table of sites, and the scores.

    Args:
        console: where it is shown.
        config: the run's.
        result: what it came to.
        whole_s: how long it took with what came before training.
    """
    privacy = result.privacy
    table = Table(title="What each site has spent")
    for heading in ("site", "declared size", "steps", "epsilon", "epsilon by RDP"):
        table.add_column(heading, justify="left" if heading == "site" else "right")
    for site, spent in privacy.sites.items():
        bound = " at most" if spent.upper_bound else ""
        table.add_row(
            site,
            f"{config.declared_sizes()[site]:,}",
            f"{spent.steps}{bound}",
            epsilon_text(spent.epsilon),
            epsilon_text(spent.epsilon_rdp),
        )
    console.print(table)
    if privacy.epsilon is not None:
        console.print(ABOUT_RDP.format(counts="epsilon"))
    if privacy.epsilon is None:
        console.print("[yellow]No privacy guarantee: this run added no noise.[/yellow]")
    elif not privacy.seeded_noise:
        console.print(f"epsilon {epsilon_text(privacy.epsilon)} at delta {privacy.delta:g} for each {privacy.unit}")
    if privacy.seeded_noise:
        console.print("[yellow]A study without a guarantee: its noise came from the configured seed.[/yellow]")
    _show_noised_scores(console, config, result)
    final = result.final
    if final.kept is not None:
        planned = rounds_in_all(result.rounds, config.federation)
        say(_kept(final.kept, result, planned=planned), console=console)
    if final.metrics:
        before = f" (before: {_scores(final.metrics_before)})" if final.metrics_before else ""
        say(f"test: {_scores(final.metrics)}{before}", style="bold", console=console)
    for code in final.findings:
        say(_finding(code, config), style="yellow", console=console)
    took = f"rounds and scores {_duration(final.seconds or 0.0)}, with loading {_duration(whole_s)}"
    console.print(f"{took}, peak memory {(final.peak_memory_bytes or 0) / 2**30:.1f} GiB")


def _kept(kept: Kept, result: RunResult, *, planned: int) -> str:
    """Which round the run kept by its validation scores, and what it means that they ended it."""
    score = _scores({kept.judged_by: kept.score})
    text = f"kept: the adapter of round {kept.round} of {len(result.rounds)} (validation {score})"
    if not kept.ended_early:
        return text
    privacy = result.privacy
    charged = max(unbounded(site.epsilon) for site in privacy.sites.values())
    ended = f"; no later round was better, so the run ended {counted(planned - len(result.rounds), 'round')} early"
    if privacy.epsilon is None:
        return text + ended
    return (
        f"{text}{ended}. The sites were charged epsilon {epsilon_text(charged)}; the claim stays the planned "
        f"{epsilon_text(privacy.epsilon)}, since the scores picked the moment"
    )


def _show_noised_scores(console: Console, config: RunConfig, result: RunResult) -> None:
    """The newest scores that the sites released: they were paid for."""
    measured = [one for one in result.rounds if one.site_scores]
    if not measured:
        return
    last, about = measured[-1], f"noised scores of held-out {result.privacy.unit}s"
    when = f"for the adapter that round {last.round} began with"
    if config.privacy.metrics_groups:
        _show_groups(console, config, last.site_scores, title=f"{about}, {when}")
        return
    scores = ", ".join(f"{site} {values[0]:.3f}" for site, values in last.site_scores.items())
    say(f"{about}, {when}: {scores}", console=console)


def _show_groups(console: Console, config: RunConfig, released: Mapping[str, Sequence[float]], *, title: str) -> None:
    """Scores by group over all sites, as far as noise leaves something of them."""
    privacy, share = config.privacy, config.data.heldout_fraction
    found = noised_groups(
        released,
        names=privacy.metrics_groups,
        sizes={site: size * share for site, size in config.declared_sizes().items()},
        noise_multiplier=privacy.metrics_noise_multiplier,
    )
    sites = len(released) - len(found.impossible)
    say(f"{title}, over {counted(sites, 'site')}, by group:", console=console)
    if found.impossible:
        whose = ", ".join(found.impossible)
        say(f"  left out, since no scores can be so: {whose}", style="yellow", console=console)
    table = Table(box=None, padding=(0, 2), pad_edge=True)
    for head in ("group", f"{privacy.unit}s", "score", "gap to the others"):
        table.add_column(head, justify="left" if head == "group" else "right")
    for group in found.told:
        score = f"{group.score:.3f} ± {group.error:.3f}"
        gap = "" if math.isnan(group.gap) else f"{group.gap:+.3f} ± {group.gap_error:.3f}"
        table.add_row(Text(group.name), f"about {group.units:,.0f}", score, gap)
    if found.told:
        console.print(table)
    if found.merged or not found.told:
        fewest = fewest_told(privacy.metrics_noise_multiplier, max(1, sites))
        where = "are among all others" if any(group.name == OTHERS for group in found.told) else "are not told"
        hidden = f"groups of fewer than about {fewest:.0f} {privacy.unit}s, of which noise leaves little, {where}"
        say(f"  {hidden}: {', '.join(found.merged) or OTHERS}", console=console)


def _changed(sites: Sequence[str]) -> str:
    which = ", ".join(sites)
    return f"The records of {which} are others than when the run began: its epsilon holds for both, each by itself."


def _finding(code: str, config: RunConfig) -> str:
    """What the scores say against the training, and what to do about it."""
    rates = config.training.lower_rates(clipped=config.privacy.private)
    lower = " ".join(f"training.{key}={rate:g}" for key, rate in rates.items())
    page = "(docs/own_data.md, When scores are low)"
    texts = {
        DATA_CHANGED: "A training file changed between two starts of this run.",
        DIVERGED: f"Training diverged: do not use this adapter. The learning rates are too high; try {lower} {page}.",
        WORSE: "The model is worse than before training. Noise, or too high a learning rate, did more than the records "
        f"taught; try {lower}, or more records {page}.",
        GUESS: "The model is no better than always giving one and the same answer. "
        f"The records may be too few for this noise {page}.",
    }
    return texts[code]


def _settings_table(config: RunConfig, shared: SharedModel, plan: Plan) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    trained = shared.initial_adapter.num_values
    sizes = ", ".join(f"{site} {size:,}" for site, size in config.declared_sizes().items())
    rows = {
        "model": f"{config.model.path}, {trained:,} trained parameters, on {shared.device}",
        "data": f"{config.data.dataset}, declared sizes: {sizes}",
        "training": f"{plan.num_rounds} rounds x {plan.local_steps} steps, sampling rate {plan.sampling_rate:g}",
        "privacy": _promise(config, plan),
    }
    if plan.private and trained:
        ratio = signal_to_noise(plan, config.declared_sizes(), values=trained)
        weak, words = ratio < WEAK_SIGNAL, signal_words(ratio)
        rows["signal"] = f"[yellow]{words}[/yellow]" if weak else words
    if config.model.dtype == "mixed" and str(shared.device) == "cpu" and not multiplies_rounded():
        rows["format"] = (
            "[yellow]model.dtype=mixed makes this run slower: this CPU has no instructions for bfloat16, and "
            "model.dtype=float32 needs less time here[/yellow]"
        )
    if not shared.keeps_states:
        rows["memory"] = (
            f"[yellow]runtime.kept_states_mib is too small to keep what the frozen layers make of the records, which "
            f"takes {math.ceil(shared.states_mib):,} MiB: training takes several times as long. "
            f"runtime.kept_states_folder, a folder on a fast disk, keeps it too[/yellow]"
        )
    for name, text in rows.items():
        table.add_row(f"[bold]{name}[/bold]", text)
    return table


def _start(about: Mapping[str, Any]) -> str:
    """The adapter that a run begins in, and what its own training spent."""
    if about["epsilon"] == UNKNOWN:
        spent = "what its training spent is unknown: no run.json lies beside it"
    elif about["epsilon"] is None:
        spent = f"its training on {about['dataset']} promises nothing about its records"
    else:
        epsilon = f"epsilon {epsilon_text(about['epsilon'])} at delta {about['delta']:g} for each {about['unit']}"
        spent = f"its training on {about['dataset']} spent {epsilon}"
    head = {True: "its head is taken, too", False: "its head has other labels: the head starts anew"}
    known = [f"the adapter {about['digest'][:12]} of {about['from']}", spent, head.get(about["head"])]
    return "; ".join(filter(None, known))


def _promise(config: RunConfig, plan: Plan) -> str:
    if not plan.private:
        return "[yellow]none (privacy=none)[/yellow]"
    marked = "; [yellow]seeded noise: a study without a guarantee[/yellow]" if config.runtime.seeded_noise else ""
    return (
        f"epsilon at most {epsilon_text(charged_epsilons(plan, plan.most_rounds)[0])} at delta {plan.delta:g} for each "
        f"{plan.unit}: "
        f"clip {plan.max_grad_norm:g}, noise {noise_words(plan)}{_contribution(plan)}{marked}"
    )


def _contribution(plan: Plan) -> str:
    return f", at most {counted(plan.records_per_user, 'record')} of a user in a step" if plan.unit == "user" else ""


def _scores(metrics: Mapping[str, float | None]) -> str:
    texts = {
        name.replace("_", "-"): "not finite" if value is None else f"{value:.3f}" for name, value in metrics.items()
    }
    return ", ".join(f"{name} {text}" for name, text in texts.items())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

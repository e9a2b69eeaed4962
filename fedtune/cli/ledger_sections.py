"""Sections of `fedtune ledger`: a ledger that was verified, and one that was put back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from fedtune.cli.plain_words import event_text, promise_text
from fedtune.ops.backup import MadeUp
from fedtune.privacy import events, filter
from fedtune.privacy.accountant import epsilon_text
from fedtune.privacy.ledger.chain import Event, Kind
from fedtune.privacy.ledger.history import History
from fedtune.privacy.ledger.spending import share_of_cap
from fedtune.privacy.ledger.verify import Verified
from fedtune.show.budget_text import (
    cap_text,
    mechanism_text,
    rounded_down,
    trust_words,
)
from fedtune.show.lines import printable
from fedtune.show.terminal_tables import Section, say
from fedtune.words import counted, unbounded

if TYPE_CHECKING:  # it takes a while to import
    from fedtune.report.facts import Lifetime, LifetimeRun

_UNITS = {"record": "one record", "user": "one person with all records of theirs"}


def show_identity(path: Path, verified: Verified) -> None:
    """Print whose ledger it is, and how far it goes."""
    opened, last = verified.history.opened, verified.events[-1]
    say(f"Ledger of site {printable(opened.site)}, population {printable(opened.population)}", style="bold")
    say(f"{path}: {counted(last.sequence, 'event')}, newest {moment(last)}")


def entries(verified: Verified, chosen: Sequence[Event]) -> Section:
    """The chosen events, a line each."""
    unit = verified.history.opened.unit
    rows = []
    for event in chosen:
        when = (str(event.sequence), event.time[:16].replace("T", " "), event.kind.value)
        rows.append((*when, printable(event.run), str(event.round or ""), event_text(event)))
    note = (
        f"rate: probability with which each {unit} joins a step; noise: in units of the most that one {unit} can move "
        "a step's sum"
    )
    return Section(
        title=f"{len(chosen)} of {counted(len(verified.events), 'event')}",
        headings=("no.", "time (UTC)", "kind", "run", "round", "what"),
        rows=rows,
        words={1, 2, 3, 5},
        whole={2},
        notes=(note,),
    )


def charged_runs(verified: Verified, *, last: int | None) -> Section:
    """A line for each run, and for each backup that was put back, by when it was last charged."""
    from fedtune.report.derive import ledger_figures  # what other commands can do without
    from fedtune.report.from_ledger import day_of, facts_by_now

    history, facts = verified.history, facts_by_now(verified)
    figures = ledger_figures.lifetime(facts)
    runs = {run.run: run for run in figures.runs}
    totals = ledger_figures.steps(facts, figures)
    lines = [(one.time or "", runs.get(one.run), epsilon_text(one.epsilon)) for one in totals]
    accepted = {event.run: day_of(event.time) for event in verified.events if event.kind is Kind.PLAN}
    lines += [(day, runs[run], "") for run, day in accepted.items() if not runs[run].rounds]
    rows = [
        (day, printable(run.run), printable(run.dataset), epsilon_text(run.epsilon), total, _state(run, history))
        if run
        else (day, "(a backup put back)", "", "", total, "")
        for day, run, total in lines
    ]
    refused = sum(event.kind is Kind.REFUSAL for event in verified.events)
    return Section(
        title=counted(len(runs), "run") if runs else "No run was accepted yet.",
        headings=("charged last", "run", "data set", "epsilon", "in all", "state"),
        rows=rows[-last:] if last else rows,
        words={0, 1, 2, 5},
        whole={0},
        notes=(
            f"Spent in all: epsilon {epsilon_text(figures.epsilon)} of {cap_text(history.cap)}.",
            "epsilon: of this run alone, by PLD; in all: of all charged by then, by the filter, which is stricter.",
            f"{counted(refused, 'refusal')}; --rounds shows each entry.",
        ),
    )


def _state(run: LifetimeRun, history: History) -> str:
    has_none = run.seeded_noise or not history.runs[run.run].plan.private
    return f"{run.state}\nNO GUARANTEE" if has_none else run.state


def show_verdict(history: History, figures: Lifetime) -> None:
    """The one thing to know."""
    unit = _UNITS.get(history.opened.unit, "one unit")
    style = "" if figures.has_guarantee else "bold yellow"
    if figures.seeded:
        text = (
            "NO GUARANTEE: a run took its noise from a seed, which anybody who knows the seed can take away again. The "
            "figures below are those of a study."
        )
    elif figures.epsilon is None:
        text = f"NO GUARANTEE: a run trained without noise. Nothing bounds what its updates tell about {unit}."
    elif figures.epsilon == 0:
        text = "Nothing was spent yet: nothing that depends on a record has left this site."
    else:
        text = (
            f"{promise_text(history.opened.unit, epsilon=figures.epsilon, delta=history.delta)} "
            f"This is epsilon {epsilon_text(figures.epsilon)} at delta {history.delta:g}."
        )
    console = Console()
    console.print()
    console.print(text, style=style, markup=False, highlight=False)
    if figures.frozen:
        say("FROZEN: all training on this population has ended for ever.", style="bold")


def lifetime(history: History, figures: Lifetime) -> Section:
    """Charged, set aside and left of the caps."""
    assert history.policy is not None
    charged = history.charged()
    share = share_of_cap(history, charged, cap=history.cap)
    set_aside = share_of_cap(history, history.taken(history.now()), cap=history.cap)
    period = f"charged this {figures.period} ({cap_text(history.policy.budget.max_epsilon_per_period)})"
    cap = "unbounded" if math.isinf(history.cap) else f"{history.cap:g}"
    notes = []
    if share is not None:
        fixed = epsilon_text(filter.surcharge(history.order, history.delta))
        notes = [
            f"A fixed part of {fixed} is due with the first noisy step, and only once; shares are of the cap's rest."
        ]
    with_set_aside = epsilon_text(figures.with_set_aside)
    left = "" if figures.frozen or set_aside is None else f"{math.floor(max(0.0, 1 - set_aside) * 100)} %"
    runs = figures.reference_runs_left
    fits = "" if runs is None else f": {counted(runs, 'run')} like the policy's reference"
    fits = ": nothing, since it is frozen" if history.frozen else fits
    return Section(
        title=f"Lifetime budget of each {history.opened.unit}, by the filter",
        headings=("", "epsilon", "share of cap"),
        rows=(
            ("charged so far", epsilon_text(figures.epsilon), _share(share)),
            (
                "the same, with all that open runs have set aside",
                with_set_aside,
                _share(set_aside),
            ),
            ("cap", cap, "100 %" if share is not None else ""),
            (f"left for new runs{fits}", rounded_down(unbounded(figures.left)), left),
            (period, epsilon_text(figures.period_epsilon), ""),
        ),
        notes=notes,
    )


def by_arrival(figures: Lifetime) -> Section | None:
    """What people have spent by when they came; nothing where one figure holds for everybody."""
    from fedtune.report.page.catalogue import catalogue  # what other commands can do without

    if figures.cohorts is None:
        return None
    rows = [
        (
            catalogue("en").arrivals([one.people]).unescape(),
            epsilon_text(one.epsilon),
            epsilon_text(one.with_set_aside),
            rounded_down(unbounded(one.left)),
        )
        for one in figures.cohorts
    ]
    return Section(
        title="By arrival",
        headings=("who", "charged", "with what open runs\nhave set aside", "left for new runs"),
        rows=rows,
        notes=["The cap holds for each line; the figures above are the largest of them."],
    )


def methods(figures: Lifetime) -> Section:
    """The same events by each method, and what the figure is good for."""
    return Section(
        title="What the figures for all events mean",
        headings=("method", "epsilon", "meaning"),
        words={0, 2},
        whole={0},
        rows=(
            (
                "filter",
                epsilon_text(figures.epsilon),
                "Holds even when every next run was chosen after seeing earlier results. Caps and verdicts use it. "
                f"Its order, {figures.order:g}, was fixed when the ledger was made.",
            ),
            (
                "PLD",
                epsilon_text(figures.epsilon_pld),
                "The closest bound, but a proof only for what was fixed beforehand: for each run's whole plan, below, "
                "it is one; for all runs together only if the first run's results did not shape the later ones.",
            ),
            ("RDP", epsilon_text(figures.epsilon_rdp), "An older method, as a check on PLD; under the same condition."),
        ),
    )


def each_run(runs: Sequence[LifetimeRun], history: History) -> Section:
    """The charge of each run by itself."""
    title = "Each run alone (epsilon: PLD of what is charged; planned: PLD of its whole plan)"
    if not runs:
        return Section(title=title, notes=("No run was accepted yet.",))
    rows, notes = [], []
    for run in runs:
        plan = history.runs[run.run].plan
        rounds, noise, rate = f"{run.rounds}/{run.most_rounds}", f"{plan.counted_noise:g}", f"{plan.sampling_rate:g}"
        epsilons = map(epsilon_text, (run.epsilon, run.planned_epsilon))
        rows.append((printable(run.run), _state(run, history), rounds, noise, rate, *epsilons))
        if run.rounds and (by_trust := plan.by_trust(run.rounds)):
            notes.append(f"{printable(run.run)}: {trust_words(by_trust)}.")
    headings = ("run", "state", "rounds", "noise", "rate", "epsilon", "planned")
    return Section(title=title, headings=headings, rows=rows, words={0, 1}, notes=notes)


def remarks(history: History) -> Iterator[str]:
    """Backups that were put back, caps that moved."""
    if history.restored:
        yield (
            f"Backups put back so far: {len(history.restored)}. What they lacked is in the figures for all events, but "
            "in no run's own."
        )
    caps = [cap for _, cap, _ in history.policies]
    if len(set(caps)) > 1:
        changes = ", then ".join(f"{cap_text(cap)} ({time[:10]})" for time, cap, _ in history.policies)
        yield f"The lifetime cap was changed: {changes}. A cap promises most when it never moves."
    if why := history.held_back():
        yield f"{why[0].upper()}{why[1:]}."


def findings(verified: Verified) -> tuple[list[str], list[str]]:
    """Checks that hold, and checks that were not made."""
    checked = [
        f"The file is whole, and holds {counted(len(verified.events), 'event')}.",
        "Each event's hash covers the event and all before it: none was changed, inserted, reordered, or deleted "
        "from the middle.",
        f"Each event is signed by site key {verified.site_key}.",
        "Each event follows from those before it; the stored replies are the newest committed ones.",
    ]
    unchecked = []
    if verified.anchor_sequence is not None:
        checked.append(
            f"The anchor's event {verified.anchor_sequence} is in the ledger, or was made up for when a backup was put "
            "back: rollback to before it is excluded."
        )
    else:
        unchecked.append(
            "Rollback is NOT excluded: without an anchor, an older copy of this ledger looks just as right. "
            "Give one with --anchor."
        )
    if not verified.key_expected:
        unchecked.append(
            "Whose key it is: it was read from the ledger itself, so somebody could have made a whole new ledger. "
            "Give the key you know with --site-key."
        )
    return checked, unchecked


def show_made_up(made_up: MadeUp, *, path: Path, anchors: Sequence[Path]) -> None:
    """Print what a ledger that was put back lacked, and what it is charged for that."""
    if made_up.last is None:
        say(f"{path} lacks nothing that {' and '.join(map(str, anchors))} know. Nothing was charged.")
        return
    ledger = made_up.ledger
    parts = [mechanism_text(event, count) for event, count in events.grouped(made_up.gap).items()]
    say(f"{path} lacked events up to number {made_up.last} of the lost ledger. Charged now, as one sum:")
    for part in parts or ["nothing: no round was charged in what is lost"]:
        say(f"  {part}")
    history = ledger.history
    say(f"Spent now: epsilon {epsilon_text(history.epsilon())} of {cap_text(history.cap)}.")
    say("Lost for good: the missing events' runs, approvals, refusals and stored replies. Not lost: cost and denials.")
    if (since := made_up.since) is not None:
        show_other_policy(since.caps[-1], time=since.time)


def show_other_policy(cap: float | None, *, time: str) -> None:
    """Print that another policy than site.toml was in force at `time`, and its lifetime `cap`."""
    say(
        f"site.toml is not the policy that was in force on {time[:10]} (lifetime cap: {cap_text(cap)}). "
        "Compare caps, leads and all else before you start the site."
    )


def moment(event: Event) -> str:
    """When it was written, to the second."""
    return f"{event.time[:19].replace('T', ' ')} UTC"


def _share(share: float | None) -> str:
    return "" if share is None else f"{math.ceil(share * 100 - 1e-9)} %"

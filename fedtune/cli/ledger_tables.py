"""What a person at a site sees of a ledger: its events, what was spent, what was checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtune.cli import ledger_json
from fedtune.cli.plain_words import cap_text, counted, event_text, odds_text, printable
from fedtune.privacy import filter
from fedtune.privacy.accountant import epsilon_text
from fedtune.privacy.ledger.chain import Event
from fedtune.privacy.ledger.history import History
from fedtune.privacy.ledger.spending import RunSpending, Spending
from fedtune.privacy.ledger.verify import Verified

_LEFT: Mapping[str, Any] = {"title_justify": "left", "caption_justify": "left"}
_UNITS = {"record": "one record", "user": "one person with all records of theirs"}


def show_events(console: Console, path: Path, verified: Verified, chosen: Sequence[Event]) -> None:
    """One row an event."""
    show_identity(console, path, verified)
    unit = verified.history.opened.unit
    table = Table(
        title=f"{len(chosen)} of {counted(len(verified.events), 'event')}",
        caption=f"rate: probability with which each {unit} joins a step; noise: in units of the most that one {unit} "
        "can move a step's sum",
        **_LEFT,
    )
    narrow = console.width < 100
    table.add_column("no.", justify="right", no_wrap=True)
    table.add_column("time (UTC)", width=10 if narrow else 16)
    table.add_column("kind", no_wrap=True)
    table.add_column("run", overflow="fold", max_width=12 if narrow else 24)
    table.add_column("round", justify="right", no_wrap=True)
    table.add_column("what", overflow="fold", ratio=1)
    for event in chosen:
        table.add_row(
            str(event.sequence),
            event.time[:16].replace("T", " "),
            event.kind.value,
            Text(printable(event.run)),
            str(event.round or ""),
            Text(event_text(event)),
        )
    console.print(table)


def show_spending(console: Console, path: Path, verified: Verified, figures: Spending) -> None:
    """Lifetime figures, what each means, and the runs."""
    show_identity(console, path, verified)
    _show_verdict(console, verified.history, figures)
    console.print(_lifetime(verified.history, figures), "", _methods(figures), "", sep="\n")
    if figures.runs:
        console.print(_runs(figures.runs, verified.history))
    else:
        console.print("No run was accepted yet.")
    for note in _remarks(verified.history):
        console.print(Text(note))


def show_verified(console: Console, path: Path, verified: Verified) -> None:
    """What was checked, and what was not."""
    show_identity(console, path, verified)
    last = verified.events[-1]
    checked = [
        f"The file is whole, and holds {counted(len(verified.events), 'event')}.",
        "Each event's hash covers the event and all before it: none was changed, inserted, reordered, or deleted "
        "from the middle.",
        f"Each event is signed by site key {verified.site_key}.",
        "Each event follows from those before it; the stored replies are the newest committed ones.",
    ]
    if verified.rollback_excluded:
        checked.append(
            f"The anchor's event {verified.anchor_sequence} is in the ledger, or was made up for when a backup was put "
            "back: rollback to before it is excluded."
        )
    console.print("[bold]Checked, and right:[/bold]")
    _print_list(console, checked)
    unchecked = []
    if not verified.rollback_excluded:
        unchecked.append(
            "Rollback is NOT excluded: without an anchor, an older copy of this ledger looks just as right. "
            "Give one with --anchor."
        )
    if not verified.key_expected:
        unchecked.append(
            "Whose key it is: it was read from the ledger itself, so somebody could have made a whole new ledger. "
            "Give the key you know with --site-key."
        )
    if unchecked:
        console.print("[bold yellow]Not checked:[/bold yellow]")
        _print_list(console, unchecked)
    console.print(f"Newest event: {last.sequence}, {_moment(last)}, hash {verified.hash}", soft_wrap=True)


def show_identity(console: Console, path: Path, verified: Verified) -> None:
    """Whose ledger this is."""
    opened, last = verified.history.opened, verified.events[-1]
    text = Text.assemble(
        (f"Ledger of site {printable(opened.site)}, population {printable(opened.population)}\n", "bold"),
        f"{path}: {counted(last.sequence, 'event')}, newest {_moment(last)}\n",
    )
    console.print(text, soft_wrap=True)


def _show_verdict(console: Console, history: History, figures: Spending) -> None:
    """The one thing to know."""
    unit = _UNITS.get(history.opened.unit, "one unit")
    if figures.seeded:
        console.print(
            "[bold yellow]NO GUARANTEE:[/bold yellow] a run took its noise from a seed, which whoever knows the seed "
            "can take away again. The figures below are those of a study."
        )
    elif math.isinf(figures.epsilon):
        console.print(
            "[bold yellow]NO GUARANTEE:[/bold yellow] a run trained without noise. Nothing bounds what its updates "
            f"tell about {unit}."
        )
    elif figures.epsilon == 0:
        console.print("Nothing was spent yet: nothing that depends on a record has left this site.")
    else:
        console.print(
            f"Whatever anybody concludes from all that left this site, {unit} more or less changed the odds of it at "
            f"most {odds_text(figures.epsilon)}-fold (e to the power of epsilon {epsilon_text(figures.epsilon)}), but "
            f"for a probability of delta {figures.delta:g}."
        )
    if figures.frozen:
        console.print("[bold]FROZEN:[/bold] this population takes part in nothing any more.")
    console.print()


def _lifetime(history: History, figures: Spending) -> Table:
    unit = history.opened.unit
    table = Table(title=f"Lifetime budget of each {unit}, by the filter", **_LEFT)
    table.add_column("")
    table.add_column("epsilon", justify="right")
    table.add_column("share of cap", justify="right")
    cap = "unbounded" if math.isinf(figures.max_epsilon) else f"{figures.max_epsilon:g}"
    left = ledger_json.epsilon_left(history)
    table.add_row("charged so far", epsilon_text(figures.epsilon), _share(figures.share))
    table.add_row(
        "the same, with all that open runs have set aside",
        epsilon_text(figures.epsilon_with_set_aside),
        _share(figures.share_with_set_aside),
    )
    table.add_row("cap", cap, "100 %" if figures.share is not None else "")
    share_left = "" if figures.frozen else _left_share(figures.share_with_set_aside)
    table.add_row(f"left for new runs{_fits(history)}", rounded_down(left), share_left)
    period = cap_text(figures.max_epsilon_per_period)
    table.add_row(f"charged this {figures.period} ({period})", epsilon_text(figures.period_epsilon), "")
    if figures.share is not None:
        fixed = epsilon_text(filter.surcharge(figures.order, figures.delta))
        table.caption = (
            f"A fixed part of {fixed} is due with the first noisy step, and only once; shares are of the cap's rest."
        )
    return table


def _fits(history: History) -> str:
    if history.frozen:
        return ": nothing, since it is frozen"
    fits = ledger_json.reference_runs_left(history)
    return "" if fits is None else f": {counted(fits, 'run')} like the policy's reference"


def _methods(figures: Spending) -> Table:
    """The same events by each method, and what the figure is good for."""
    table = Table(title="What the figures for all events mean", **_LEFT)
    table.add_column("method", no_wrap=True)
    table.add_column("epsilon", justify="right")
    table.add_column("meaning", ratio=1)
    table.add_row(
        "filter",
        epsilon_text(figures.epsilon),
        "Holds even when every next run was chosen after seeing earlier results. Caps and verdicts use it. "
        f"Its order, {figures.order:g}, was fixed when the ledger was made.",
    )
    table.add_row(
        "PLD",
        epsilon_text(figures.epsilon_pld),
        "The closest bound, but a proof only for what was fixed beforehand: for each run's whole plan, below, it is "
        "one; for all runs together only if the first run's results did not shape the later ones.",
    )
    table.add_row(
        "RDP", epsilon_text(figures.epsilon_rdp), "An older method, as a check on PLD; under the same condition."
    )
    return table


def _runs(runs: Iterable[RunSpending], history: History) -> Table:
    table = Table(title="Each run alone (epsilon: PLD of what is charged; planned: PLD of its whole plan)", **_LEFT)
    table.add_column("run", overflow="fold", min_width=8)
    table.add_column("state")
    for heading in ("rounds", "noise", "rate", "epsilon", "by RDP", "planned"):
        table.add_column(heading, justify="right")
    for run in runs:
        proposal = history.runs[run.run].proposal
        state = f"{run.state}\nNO GUARANTEE" if proposal.seeded_noise or not run.noise_multiplier else run.state
        table.add_row(
            Text(printable(run.run)),
            state,
            f"{run.rounds}/{run.most_rounds}",
            f"{run.noise_multiplier:g}",
            f"{run.sampling_rate:g}",
            epsilon_text(run.epsilon),
            epsilon_text(run.epsilon_rdp),
            epsilon_text(run.planned_epsilon),
        )
    return table


def _remarks(history: History) -> Iterable[str]:
    if history.restored:
        yield (
            f"Backups put back so far: {len(history.restored)}. What they lacked is in the figures for all events, but "
            "in no run's own."
        )
    caps = [cap for _, cap in history.policies]
    if len(set(caps)) > 1:
        changes = ", then ".join(f"{cap_text(cap)} ({time[:10]})" for time, cap in history.policies)
        yield f"The lifetime cap was changed: {changes}. A cap promises most when it never moves."


def _print_list(console: Console, texts: Iterable[str]) -> None:
    grid = Table.grid(padding=(0, 1, 0, 0))
    for text in texts:
        grid.add_row(" -", Text(text, overflow="fold"))
    console.print(grid)


def _moment(event: Event) -> str:
    return f"{event.time[:19].replace('T', ' ')} UTC"


def _share(share: float | None) -> str:
    return "" if share is None else f"{math.ceil(share * 100 - 1e-9)} %"


def _left_share(share: float | None) -> str:
    return "" if share is None else f"{math.floor(max(0.0, 1 - share) * 100)} %"


def rounded_down(epsilon: float) -> str:
    """An epsilon that is left, in three decimals."""
    return "unbounded" if math.isinf(epsilon) else f"{math.floor(epsilon * 1000) / 1000:.3f}"

"""What a person sees in the terminal of a report that was written, checked, or compared with another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtune.cli.plain_words import counted, printable
from fedtune.cli.report_checks import Check
from fedtune.privacy.accountant import epsilon_text
from fedtune.report.difference import GROUPS, Change, Group, Value
from fedtune.report.model import Report, State

_STATES: Mapping[State, str] = {
    "within": "[bold]WITHIN[/bold] the approved budget",
    "exceeded": "[bold red]EXCEEDED[/bold red]",
    "no_guarantee": "[bold yellow]NO GUARANTEE[/bold yellow]",
}
_MARKS: Mapping[str, str] = {
    "right": "[green]right[/green]",
    "wrong": "[bold red]WRONG[/bold red]",
    "not_checked": "[yellow]not checked[/yellow]",
}
_MOST_PROBLEMS = 12
_UNBOUNDED = ("epsilon", "epsilon_pld", "epsilon_rdp", "planned_epsilon", "with_set_aside", "period_epsilon")
_NO_LIMIT = ("max_epsilon", "max_epsilon_per_run", "max_epsilon_per_period", "target_epsilon", "left")
_TITLES: Mapping[Group, str] = {
    "settings": "Settings",
    "privacy": "Privacy",
    "utility": "Scores on the lead's files",
    "cost": "Cost",
}


def show_written(console: Console, report: Report, paths: Sequence[Path]) -> None:
    """The verdict, and where everything lies."""
    console.print(verdict_line(report), soft_wrap=True)
    for path in paths:
        console.print(f"{path.name + ':':<13}{path}", markup=False, soft_wrap=True)


def verdict_line(report: Report) -> str:
    """The verdict and the figure behind it, in rich's markup."""
    reasons = ", ".join(code.replace("_", " ") for code in report.verdict.reasons)
    state = _STATES[report.verdict.state] + (f" ({reasons})" if reasons else "")
    return f"{state}: epsilon {epsilon_text(report.epsilon)} at delta {report.delta:g} for each {report.unit}"


def show_checks(console: Console, path: Path, report: Report, checks: Sequence[Check]) -> None:
    """A line for each check, and what differs below it."""
    console.print(Text(f"{path}: report of {report.kind} {printable(report.name)}", style="bold"), soft_wrap=True)
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for check in checks:
        grid.add_row(check.name, _MARKS[check.state], Text(check.text))
        for problem in check.problems[:_MOST_PROBLEMS]:
            said, found = printable(problem.said), printable(problem.found)
            grid.add_row("", "", Text(f"{printable(problem.where)} says {said}, found {found}"))
        if len(check.problems) > _MOST_PROBLEMS:
            grid.add_row("", "", f"and {len(check.problems) - _MOST_PROBLEMS:,} more")
    console.print(grid)


def show_differences(console: Console, names: tuple[str, str], changes: Sequence[Change], *, configured: bool) -> None:
    """A table for each group with a difference.

    Args:
        console: to print on.
        names: of the two reports.
        changes: between them.
        configured: whether both runs' configurations were at hand.
    """
    for group in GROUPS:
        rows = [change for change in changes if change.group == group]
        if not rows:
            console.print(f"{_TITLES[group]}: no difference.")
            continue
        table = Table(title=f"{_TITLES[group]}: {counted(len(rows), 'difference')}", title_justify="left")
        table.add_column("", overflow="fold", ratio=2)
        for name in names:
            table.add_column(Text(printable(name)), overflow="fold", ratio=1)
        for change in rows:
            table.add_row(Text(printable(change.key)), *map(Text, _both(change)))
        console.print(table)
    if not configured:
        console.print("The runs' configurations are not beside the reports: only the settings in them are compared.")


def _both(change: Change) -> tuple[str, str]:
    """Both values, in as many digits as it takes to tell them apart."""
    pair = (_text(change.key, change.before), _text(change.key, change.after))
    if pair[0] == pair[1]:
        pair = (repr(change.before), repr(change.after))
    before, after = map(printable, pair)
    return "not there" if change.missing == "before" else before, "not there" if change.missing == "after" else after


def _text(key: str, value: Value) -> str:
    name = key.rsplit(".", 1)[-1]
    if value is None:
        return "no limit" if name in _NO_LIMIT else "unbounded" if name in _UNBOUNDED else "none"
    if isinstance(value, bool | str):
        return {True: "yes", False: "no", "": "none"}.get(value, str(value))
    if name in _UNBOUNDED:
        return epsilon_text(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"

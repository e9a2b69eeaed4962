"""A plan on the terminal: tables, and epsilon by round as bars."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fedtune.cli import plan_words as words
from fedtune.cli.plain_words import printable
from fedtune.cli.plan_outlook import Outlook
from fedtune.cli.plan_policies import policies
from fedtune.cli.plan_words import Section
from fedtune.federation.planner import RoundPrice

_EIGHTHS = " ▏▎▍▌▋▊▉"
_MOST_BAR = 60


def show(console: Console, outlook: Outlook) -> None:
    """Print everything that is known of a run."""
    console.print(Text.assemble(("fedtune plan", "bold"), f" {printable(outlook.config.name)}"))
    console.print(Text(words.promise(outlook), style="bold" if outlook.guaranteed else "bold yellow"))
    console.print(_facts(words.facts(outlook)))
    _print(console, words.sites(outlook))
    section = words.rounds(outlook)
    if section.rows:
        room = console.width - sum(max(map(len, column)) + 2 for column in zip(*section.rows, strict=True)) - 14
        _print(console, section, bars=_bars(outlook, width=max(10, min(room, _MOST_BAR))))
    _print(console, words.accountants(outlook))
    if outlook.changes:
        _print(console, words.what_if(outlook))
    _print(console, words.bytes_and_time(outlook))
    for section in policies(outlook):
        _print(console, section)


def _facts(facts: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, text in facts.items():
        table.add_row(Text(name, style="bold"), Text(text))
    return table


def _print(console: Console, section: Section, *, bars: tuple[str, list[Text]] | None = None) -> None:
    if not section.rows and not section.notes:
        return
    console.print()
    console.print(Text(section.title, style="bold"), soft_wrap=True)
    if section.rows:
        gap = 2 if console.width >= 100 else 1
        table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="dim")
        for number, heading in enumerate(section.headings):
            left = number in section.words
            table.add_column(heading, justify="left" if left else "right", no_wrap=not left, overflow="fold")
        if bars is not None:
            table.add_column(bars[0], no_wrap=True)
        for number, row in enumerate(section.rows):
            table.add_row(*map(Text, row), *([bars[1][number]] if bars is not None else []))
        console.print(Padding(table, (0, 0, 0, 2)))
    for note in section.notes:
        console.print(Padding(Text(note), (0, 0, 0, 2)))


def _bars(outlook: Outlook, *, width: int) -> tuple[str, list[Text]]:
    """A heading and one bar a round: solid to PLD, light to RDP, a stroke at the filter."""
    rounds = outlook.price.rounds
    largest = max(max(one.pld, one.rdp, one.filter) for one in rounds)
    heading = "█ PLD ░ to RDP │ filter"
    return heading, [_bar(one, scale=(width - 1) / largest) for one in rounds]


def _bar(one: RoundPrice, *, scale: float) -> Text:
    whole, eighths = divmod(round(one.pld * scale * 8), 8)
    solid = "█" * whole + (_EIGHTHS[eighths] if eighths else "")
    light = "░" * (round(one.rdp * scale) - len(solid))
    bar = Text.assemble((solid, "blue"), (light, "blue"))
    place = round(one.filter * scale)
    bar.pad_right(max(0, place - len(bar)))
    bar.append("│", style="green")
    return bar

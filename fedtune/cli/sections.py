"""What commands say: sections of a title, a table and notes, on the terminal or a page; lines; the same as JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fedtune.spec import ConfigError
from fedtune.words import jsonable

SCHEMA_VERSION = 1
"""Of what `--json` prints."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A table with what is to be said about it.

    Attributes:
        headings: of the columns; empty: without headings.
        words: numbers of the columns that hold words, which stand on the left and may be broken; the others hold
            numbers, which are never broken.
        whole: numbers of the columns of words that are never broken either, since a person types them.
        styles: of rows that stand out, by number.
    """

    title: str = ""
    headings: tuple[str, ...] = ()
    rows: Sequence[tuple[str, ...]] = ()
    words: frozenset[int] = frozenset({0})
    whole: frozenset[int] = frozenset()
    notes: Sequence[str] = ()
    styles: Mapping[int, str] = dataclasses.field(default_factory=dict)


def pairs(rows: Mapping[str, str], *, title: str = "") -> Section:
    """Names and what they say, in two columns."""
    return Section(title=title, rows=tuple(rows.items()), words=frozenset({0, 1}), whole=frozenset({0}))


def show(console: Console, sections: Iterable[Section]) -> None:
    """Print sections with a line between them; one without rows and notes is left out."""
    for section in sections:
        if not section.rows and not section.notes:
            continue
        console.print()
        if section.title:
            say(section.title, style="bold", console=console)
        if section.rows:
            console.print(Padding(_table(section, gap=2 if console.width >= 100 else 1), (0, 0, 0, 2), expand=False))
        for note in section.notes:
            console.print(Padding(Text(_harmless(note)), (0, 0, 0, 2), expand=False))


def as_html(section: Section) -> Markup:
    """The section for a page; nothing where it has no rows and no notes."""
    if not section.rows and not section.notes:
        return Markup("")
    heading = Markup("<h2>{}</h2>").format(section.title) if section.title else Markup("")
    rows = [_html_row("th", section.headings, words=section.words)] if section.headings and section.rows else []
    rows += [_html_row("td", row, words=section.words) for row in section.rows]
    table = Markup("<table>{}</table>").format(Markup("").join(rows)) if rows else Markup("")
    notes = Markup("").join(Markup('<p class="note">{}</p>').format(note) for note in section.notes)
    return Markup("{}{}{}\n").format(heading, table, notes)


_PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 "Segoe UI", Roboto, "Helvetica Neue", Arial, "Liberation Sans", "Noto Sans", sans-serif;
  max-width: 66rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }}
h1 {{ font-size: 1.7rem; }}
h2 {{ margin: 2rem 0 .5rem; font-size: 1.2rem; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; margin: .5rem 0; }}
th, td {{ border-bottom: 1px solid #ccc; padding: .3rem .8rem .3rem 0; text-align: right; vertical-align: top; }}
th {{ border-bottom: 2px solid #666; font-weight: 600; white-space: pre-line; vertical-align: bottom; }}
th.word, td.word {{ text-align: left; }}
td {{ font-variant-numeric: tabular-nums; }}
svg {{ width: 100%; height: auto; max-width: 40rem; }}
.promise {{ border-left: .4rem solid #0072B2; padding-left: 1rem; font-size: 1.1rem; }}
.none {{ border-color: #D55E00; }}
.banner {{ border: 3px solid #8f1d00; color: #8f1d00; font-weight: 700; padding: .4rem 1rem; }}
.note {{ color: #444; margin: .2rem 0; }}
@media print {{ body {{ margin: 0; font-size: 11px; }} h2 {{ break-after: avoid; }}
  table, svg {{ break-inside: avoid; }} }}
</style></head><body>
<h1>{title}</h1>
{banners}<p class="{kind}"><strong>{promise}</strong></p>
{body}
<p class="note">{last}</p>
</body></html>
"""


def as_page(
    title: str, *, promise: str, holds: bool, body: Iterable[Markup], last: str, banners: Iterable[str] = ()
) -> str:
    """A page that needs nothing else: no script, no font, no request.

    Args:
        title: of the page.
        promise: what it says first.
        holds: whether that is good news.
        body: what follows, such as sections.
        last: its last line.
        banners: that what it tells of is a simulation or a study.
    """
    kind = "promise" if holds else "promise none"
    first = Markup("").join(Markup('<p class="banner">{}</p>\n').format(banner) for banner in banners)
    return Markup(_PAGE).format(
        title=title, kind=kind, promise=promise, body=Markup("").join(body), last=last, banners=first
    )


def write_file(path: Path, text: str, *, option: str) -> None:
    """Write what a command made to the file that an option names; one that is there is replaced.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(option, str(path), f"must be a file that can be written ({error.strerror})") from None


def _html_row(cell: str, texts: Iterable[str], *, words: Collection[int]) -> Markup:
    cells = (
        Markup("<{0}{1}>{2}</{0}>").format(cell, Markup(" class=word") if number in words else "", text)
        for number, text in enumerate(texts)
    )
    return Markup("<tr>{}</tr>").format(Markup("").join(cells))


def _table(section: Section, *, gap: int) -> Table:
    headed = bool(section.headings)
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="dim", show_header=headed)
    for number, column in enumerate(zip(*section.rows, strict=True)):
        left = number in section.words
        broken = left and number not in section.whole
        table.add_column(
            Text(_harmless(section.headings[number])) if headed else "",
            justify="left" if left else "right",
            no_wrap=not broken,
            min_width=None if broken else max(len(line) for cell in column for line in (cell.splitlines() or [""])),
            overflow="fold",
        )
    for number, row in enumerate(section.rows):
        table.add_row(*(Text(_harmless(cell)) for cell in row), style=section.styles.get(number, ""))
    return table


def say(text: str, *, style: str = "", console: Console | None = None) -> None:
    """Print a line as it is: paths and fingerprints are copied, and so never broken."""
    (console or Console()).print(Text(_harmless(text), style=style), soft_wrap=True)


def _harmless(text: str) -> str:
    """A text without what could steer a terminal: names and words may come from others."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


def print_json(value: Any) -> None:
    """Print a value for machines."""
    sys.stdout.write(json_text(value))


def json_text(value: Any) -> str:
    """A value as JSON; null stands for what nothing bounds, since JSON has no infinity."""
    return json.dumps(jsonable(value), indent=1, allow_nan=False) + "\n"

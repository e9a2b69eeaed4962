"""Terminal output: sections with a title, a table and notes, confirmations, output files and JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from operator import gt
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from fedtune.formatting import convert_to_jsonable
from fedtune.privacy.durable import write_durably
from fedtune.show.lines import replace_control_characters, wrap_text
from fedtune.spec import ConfigError, RunError

SCHEMA_VERSION = 1  # version of the `--json` output
_NARROWEST = 8  # minimum width of a text column


@dataclass(frozen=True, slots=True)
class Section:
    """A table with a title and notes."""

    title: str = ""
    headings: tuple[str, ...] = ()  # column headings; empty: no headings
    rows: Sequence[tuple[str, ...]] = ()
    _: dataclasses.KW_ONLY
    # indices of text columns, which are left-aligned and may be wrapped; other columns contain numbers,
    # which are never wrapped
    words: Collection[int] = (0,)
    # indices of text columns that are never wrapped, because users copy their cells
    whole: Collection[int] = ()
    notes: Sequence[str] = ()
    styles: Mapping[int, str] = dataclasses.field(default_factory=dict)  # style of highlighted rows by index


def build_key_value_section(rows: Mapping[str, str], *, title: str = "") -> Section:
    """Build a section with a two-column table of names and values."""
    return Section(title=title, rows=tuple(rows.items()), words={0, 1}, whole={0})


def show(sections: Iterable[Section], *, console: Console | None = None) -> None:
    """Print nonempty sections, separated by blank lines."""
    console = console or Console()
    for section in (one for one in sections if one.rows or one.notes):
        console.print()
        if section.title:
            say(section.title, style="bold", console=console)
        if section.rows:
            console.print(_layout_table(section, console.width), soft_wrap=True)
        for note in section.notes:
            say(f"  {note}", console=console)


def write_file(path: Path, content: str | bytes, *, option: str) -> None:
    """Write a command's output file atomically, replacing an existing file.

    Args:
        path: the file.
        content: text or bytes.
        option: the option with the path, for error messages.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        write_durably(path, content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise ConfigError(option, str(path), f"must be a file that can be written ({error.strerror})") from None


def _layout_table(section: Section, width: int) -> Text:
    """Lay out a table within `width` characters.  Only lines with an unbreakable path or hash are longer."""
    gap = 2 if width >= 100 else 1
    rows = [tuple(map(replace_control_characters, row)) for row in section.rows]
    headings = tuple(map(replace_control_characters, section.headings)) or ("",) * len(rows[0])
    widths = _choose_column_widths(section, rows, headings, room=width - 2 - gap * (len(headings) - 1))
    all_rows = [headings, *rows] if section.headings else rows
    lines = [[wrap_text(cell, width=most) for cell, most in zip(row, widths, strict=True)] for row in all_rows]
    needed = (max(cell_len(line) for cell in column for line in cell) for column in zip(*lines, strict=True))
    widths = list(map(min, widths, needed))
    said = Text()
    for number, cells in enumerate(lines, -bool(section.headings)):
        style = "dim" if number < 0 else section.styles.get(number, "")
        if number < 0:  # align short headings with the bottom line
            cells = [[""] * (max(map(len, cells)) - len(cell)) + cell for cell in cells]
        for line in zip_longest(*_separate_cells(cells, widths), fillvalue=""):
            placed = (_pad_cell(text, widths[at], left=at in section.words) for at, text in enumerate(line))
            said.append("  " + (" " * gap).join(placed).rstrip() + "\n", style=style)
    return said[:-1]


def _separate_cells(cells: list[list[str]], widths: Sequence[int]) -> list[list[str]]:
    """Move the cells to the right of an overwide cell to the next line.

    Otherwise the terminal would wrap the line within words and numbers.
    """
    for at, cell in enumerate(cells[:-1], start=1):
        beside = max(map(len, cells[at:]))
        if any(cell_len(line) > widths[at - 1] for line in cell[:beside]):
            return [*cells[:at], *([""] * len(cell) + other for other in cells[at:])]
    return cells


def _choose_column_widths(
    section: Section, rows: Sequence[tuple[str, ...]], headings: tuple[str, ...], *, room: int
) -> list[int]:
    """Choose column widths for `room` characters: wrap headings first, then text cells, then words in headings."""
    held = [max(cell_len(line) for cell in column for line in cell.split("\n")) for column in zip(*rows, strict=True)]
    widths = [max(most, *map(cell_len, heading.split("\n"))) for heading, most in zip(headings, held, strict=True)]
    in_heading = [max(map(cell_len, heading.split() or [""])) for heading in headings]
    by_words = [_NARROWEST if at in section.words and at not in section.whole else most for at, most in enumerate(held)]
    for least in (map(max, held, in_heading), map(max, by_words, in_heading), by_words):
        floor = list(least)
        while sum(widths) > room and any(map(gt, widths, floor)):
            widths[max((at for at, most in enumerate(widths) if most > floor[at]), key=widths.__getitem__)] -= 1
    return widths


def _pad_cell(text: str, width: int, *, left: bool) -> str:
    room = " " * (width - cell_len(text))
    return text + room if left else room + text


def say(text: str, *, style: str = "", console: Console | None = None) -> None:
    """Print a text, wrapped to the terminal's width with `wrap_text`."""
    console = console or Console()
    lines = wrap_text(replace_control_characters(text), width=console.width)
    console.print(Text("\n".join(lines), style=style), soft_wrap=True)


def require_confirmation(question: str, *, otherwise: str) -> None:
    """Ask the user for confirmation.  A missing answer, for example without a terminal, counts as no.

    Raises:
        RunError: the user did not confirm; the message is `otherwise`.
    """
    sys.stdout.write(f"{question} [y/N] ")
    sys.stdout.flush()
    there = sys.stdin is not None and not sys.stdin.closed
    if not (there and sys.stdin.readline().strip().lower() in ("y", "yes")):
        raise RunError(otherwise)


def print_json(figures: Mapping[str, Any]) -> None:
    """Print a command's answer as one JSON object, which starts with the schema version."""
    sys.stdout.write(to_json_text({"schema_version": SCHEMA_VERSION, **figures}))


def to_json_text(value: Any) -> str:
    """Serialize a value as JSON, with null for infinity, which JSON lacks."""
    return json.dumps(convert_to_jsonable(value), indent=1, allow_nan=False) + "\n"

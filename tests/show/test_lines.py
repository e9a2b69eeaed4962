"""Line wrapping for the terminal, without breaking text that users copy."""

import io
import re
import shlex

import pytest
from rich.console import Console

from fedtune.show.lines import to_printable, wrap_text
from fedtune.show.terminal_tables import Section, _layout_table, show


def test_paths_and_keys_are_never_broken_across_lines() -> None:
    path, key = "/srv/" + "a-long-folder/" * 9, "ab" * 32
    assert wrap_text(f"- The report is in {path} now.", width=40) == ["- The report is in", f"  {path}", "  now."]
    assert wrap_text(f" 1. Key {key}: compare it", width=40) == [" 1. Key", f"    {key}:", "    compare it"]
    console = io.StringIO()
    rows = [("site", f"the key {key} of a site", "7")]
    show([Section(rows=rows, words={0, 1})], console=Console(file=console, width=60))
    assert key in console.getvalue()
    assert console.getvalue().splitlines()[1] == "  site the key                                             7"
    # A name without room is broken.
    assert wrap_text("rural-clinic-in-the-far-north", width=20) == ["rural-clinic-in-the-", "far-north"]
    assert wrap_text("x" * 30, width=20) == ["x" * 20, "x" * 10]


@pytest.mark.parametrize("front", ["", "Continue with: "])
def test_wrapped_command_is_unchanged_when_copied(front: str) -> None:
    command = "fedtune search experiment=banks training.learning_rate='log(0.001, 0.1)' --trials 8 --method tpe"
    lines = wrap_text(front + command, width=50)
    assert all(len(line) <= 50 for line in lines)
    assert lines[0].startswith(front.strip() or "fedtune")
    typed = "\n".join(lines[1:] if front else lines)
    assert re.search(r" \\\n", typed)
    assert shlex.split(typed.replace("\\\n", "")) == shlex.split(command)
    prose = f"{front}{command}. Then look at the table."
    assert "\\" not in "".join(wrap_text(prose, width=50)), "a sentence goes on after it"


def test_to_printable_removes_control_characters_and_shortens() -> None:
    assert to_printable("a\x1b[2Jb\u202e") == "a?[2Jb?"
    assert to_printable("x" * 500) == "x" * 197 + "..."


def test_long_name_moves_table_values_to_the_next_line() -> None:
    """A run's name is never broken; the figures move to the next line instead."""
    name = f"a-long-name-of-a-run-{'0123456789abcdef' * 2}"
    row = (name, "ended", "20/20", "1.23457", "0.0123457", "8.000", "8.000")
    headings = ("run", "state", "rounds", "noise", "rate", "epsilon", "planned")
    lines = _layout_table(Section(headings=headings, rows=[row], words={0, 1}), 80).plain.split("\n")
    assert lines[1] == f"  {name}"
    assert lines[2].split() == list(row[1:])
    assert max(map(len, lines)) <= 80
    short = ("short", *row[1:])
    assert _layout_table(Section(headings=headings, rows=[short], words={0, 1}), 80).plain.split("\n")[1].split() == [
        *short
    ]

"""`fedtune site doctor`: its lines as text or JSON, and its exit code."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from fedtune.cli import sections
from fedtune.cli.compose import compose_run
from fedtune.cli.plain_words import printable
from fedtune.deploy.doctor.check import REFUSED, SETTINGS, Check, exit_code_of
from fedtune.deploy.doctor.examination import Visit, examine
from fedtune.spec import FedtuneError, RefusedError, RunError
from fedtune.words import counted

_MARKS = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}
_NAME, _FOUND, _FIX = 8, 28, 11
"""Columns at which a check's name, what was found and what to do about it begin."""
_MOST_TEXT = 1000


class SomethingFailed(FedtuneError):
    """A check of something at the site failed."""

    exit_code = 2


def examine_site(*, kit: Path, site_toml: Path, model: Path | None, run: Sequence[str], as_json: bool) -> None:
    """Make every check, and print a line for each.

    Args:
        kit: the site's.
        site_toml: its policy.
        model: to install first.
        run: settings of a run to try out; empty: none.
        as_json: print for machines.

    Raises:
        SomethingFailed: at the site.
        RefusedError: policy or budget would refuse the run that was named.
        RunError: the server cannot be reached, or does not take this site.
    """
    visit = Visit(kit=kit, site_toml=site_toml, model=model, run=(lambda: compose_run(run)) if run else None)
    finish((print_json if as_json else print_lines)(examine(visit)))


def print_lines(checks: Iterable[Check]) -> list[Check]:
    """Print each check when it is made, and how many there were of each kind."""
    console, made = Console(highlight=False), []
    for check in checks:
        _print_line(console, check)
        made.append(check)
    counts = {mark: sum(check.status == mark for check in made) for mark in _MARKS}
    console.print("\n" + ", ".join(f"{count} {mark}" for mark, count in counts.items() if count))
    return made


def print_json(checks: Iterable[Check]) -> list[Check]:
    """Print all checks as one JSON object."""
    made = list(checks)
    sections.print_json({"checks": [check.to_json() for check in made], "ok": exit_code_of(made) == 0})
    return made


def finish(checks: Sequence[Check]) -> None:
    """Raise what the checks' failures come to; nothing where none failed."""
    code, names = exit_code_of(checks), [check.name for check in checks if check.status == "failed"]
    if not code:
        return
    message = f"{counted(len(names), 'check')} failed ({', '.join(names)}); each line says what to do"
    raise {SETTINGS: SomethingFailed, REFUSED: RefusedError}.get(code, RunError)(message)


def _print_line(console: Console, check: Check) -> None:
    found = check.found.removeprefix(f"{check.status}, ")
    lines = [f"{check.status:<{_NAME}}{printable(check.name)}"]
    if len(lines[0]) < _FOUND:
        lines[0] = lines[0].ljust(_FOUND)
    else:
        lines.append(" " * _FOUND)  # a long name has a line to itself
    first, *rest = _wrapped(printable(found, _MOST_TEXT), console.width - _FOUND)
    lines[-1] += first
    lines += [" " * _FOUND + part for part in rest]
    fix = _wrapped(printable(check.fix, _MOST_TEXT), console.width - _FIX)
    lines += [("" if number else "->").rjust(_FIX - 1) + f" {part}" for number, part in enumerate(fix)]
    text = Text("\n".join(line.rstrip() for line in lines))
    text.stylize(_MARKS[check.status], 0, len(check.status))
    console.print(text, soft_wrap=True)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of whole words: paths, keys and hashes are there to be copied."""
    return textwrap.wrap(text, max(20, width), break_long_words=False, break_on_hyphens=False)

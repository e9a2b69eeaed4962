"""Arrival cohorts: the people of a population by the calendar period in which they came.

A run names the cohorts that it admits, and only these are charged for it.  Cohorts are numbered by `period_of`, so the
next period has the next number, and number 0 stands for everybody without a date.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, date, datetime
from functools import lru_cache
from typing import Literal

from fedtune.codec import decode, require
from fedtune.spec import ConfigError, spec

Calendar = Literal["month", "quarter", "year"]
MONTHS = {"month": 1, "quarter": 3, "year": 12}  # how long each period is
OLDEST = 0  # the cohort of people without a date: before every other one
_NAMES = {"month": r"([0-9]{4})-(0[1-9]|1[0-2])", "quarter": r"([0-9]{4})-Q([1-4])", "year": r"([0-9]{4})()"}
_EXAMPLES = {"month": "2026-03", "quarter": "2026-Q1", "year": "2026"}


def period_of(moment: date, period: str) -> int:
    """The number of the calendar period that a UTC `moment` lies in; the next period has the next number."""
    return (12 * moment.year + moment.month - 1) // MONTHS[period]


def cohort_of(month: str, period: str) -> int:
    """The cohort of somebody who came in `month`, as "2026-03"; "": nobody knows when."""
    return period_of(date.fromisoformat(f"{month}-01"), period) if month else OLDEST


def cohort_name(cohort: int, period: str) -> str:
    """As a plan writes it: "2026", "2026-Q1", "2026-03"; "before" for the oldest.

    >>> cohort_name(cohort_of("2026-03", "quarter"), "quarter")
    '2026-Q1'
    """
    if cohort == OLDEST:
        return "before"
    year, months = divmod(cohort * MONTHS[period], 12)
    part = months // MONTHS[period] + 1
    return f"{year:04}" + {"month": f"-{part:02}", "quarter": f"-Q{part}", "year": ""}[period]


@lru_cache(maxsize=4096)
def _number(key: str, name: str, period: str) -> int:
    found = re.fullmatch(_NAMES[period], name)
    if found is None or found[1] == "0000":
        raise ConfigError(key, name, f"must be a {period}, such as {_EXAMPLES[period]}")
    return (12 * int(found[1])) // MONTHS[period] + int(found[2] or 1) - 1


@spec
class Cohorts:
    """The arrival cohorts that a run admits: one charge for each of them, whether it has members or not.

    Attributes:
        period: the calendar by which the population's people arrive: "month", "quarter" or "year".
        first: the first cohort, such as "2026", "2026-Q1" or "2026-03"; null: the oldest, with people without a date.
        last: the last cohort, written likewise.
    """

    period: Calendar
    last: str
    first: str | None = None

    def __post_init__(self) -> None:
        first, last = self.span
        require("last", self.last, first <= last, f"must not be before first = {self.first}")

    @property
    def span(self) -> tuple[int, int]:
        """The numbers of the first and the last cohort."""
        first = OLDEST if self.first is None else _number("first", self.first, self.period)
        return first, _number("last", self.last, self.period)

    def __contains__(self, cohort: int) -> bool:
        first, last = self.span
        return first <= cohort <= last

    def __str__(self) -> str:
        """As a ledger's entry says it: `..2026`, `2025..2026`."""
        return f"{self.first or ''}..{self.last}"

    @classmethod
    def of(cls, said: str, period: str) -> Cohorts:
        """The cohorts that `str` wrote; raises ConfigError for anything else."""
        first, _, last = said.partition("..")
        return decode(cls, {"period": period, "first": first or None, "last": last})


def groups(admissions: Iterable[Cohorts | None], *, oldest_apart: bool = False) -> list[int]:
    """The first cohort of each group that takes part in the same of these `admissions` (None: everybody), ascending.

    With `oldest_apart` the oldest cohort owes what it took no part in, so that nobody else is in its group.

    >>> year = [Cohorts(period="year", first=None, last="2025"), Cohorts(period="year", first="2025", last="2026")]
    >>> groups(year), groups([None])
    ([0, 2025, 2026, 2027], [0])
    """
    begins = {OLDEST, OLDEST + 1} if oldest_apart else {OLDEST}
    for admitted in admissions:
        if admitted is not None:
            first, last = admitted.span
            begins |= {first, last + 1}
    return sorted(begins)


def moved(cohorts: Cohorts, *, by: int = 1) -> Cohorts:
    """The window so many periods later, as long as before; one that begins with the oldest cohort grows instead.

    >>> str(moved(Cohorts(period="quarter", first="2025-Q4", last="2026-Q3")))
    '2026-Q1..2026-Q4'
    """
    (first, last), period = cohorts.span, cohorts.period
    # No period comes after the year 9999: a window up to there, which has no end, keeps it.
    begins, ends = (cohort_name(min(one + by, period_of(date.max, period)), period) for one in (first, last))
    return Cohorts(period=period, first=None if first == OLDEST else begins, last=ends)


def next_window(before: Cohorts, *, real: bool) -> Cohorts:
    """The window moved on by one period; at `real` sites only into one that has begun.

    Whoever wants to charge people of a later period names the window, so that nobody does so by a command given twice.
    """
    after = moved(before)
    if real and after.span[1] > period_of(datetime.now(UTC), after.period):
        first = "" if after.first is None else f"privacy.cohorts.first={after.first} "
        bound = f"has not begun: the {after.period} that --renew would charge next. If you want to charge it now, name"
        bound += f" the window: {first}privacy.cohorts.last={after.last}"
        raise ConfigError("privacy.cohorts.last", after.last, bound)
    return after

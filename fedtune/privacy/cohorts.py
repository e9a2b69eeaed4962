"""Arrival cohorts: the people of a population, grouped by the calendar period in which they joined.

A run names the cohorts that it admits, and only these are charged for it.  `compute_period_number` numbers the
cohorts, so that consecutive periods have consecutive numbers; cohort 0 holds everybody without a date.
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


def compute_period_number(moment: date, period: str) -> int:
    """Return the number of the calendar period that contains the UTC `moment`; consecutive periods are numbered in
    order.
    """
    return (12 * moment.year + moment.month - 1) // MONTHS[period]


def compute_cohort_number(month: str, period: str) -> int:
    """Return the cohort of a person who joined in `month`, such as "2026-03"; an empty `month` means an unknown
    date.
    """
    return compute_period_number(date.fromisoformat(f"{month}-01"), period) if month else OLDEST


def format_cohort_name(cohort: int, period: str) -> str:
    """Return a cohort's name as a plan writes it: "2026", "2026-Q1" or "2026-03"; "before" for the oldest cohort.

    >>> format_cohort_name(compute_cohort_number("2026-03", "quarter"), "quarter")
    '2026-Q1'
    """
    if cohort == OLDEST:
        return "before"
    year, months = divmod(cohort * MONTHS[period], 12)
    part = months // MONTHS[period] + 1
    return f"{year:04}" + {"month": f"-{part:02}", "quarter": f"-Q{part}", "year": ""}[period]


@lru_cache(maxsize=4096)
def _parse_period(key: str, name: str, period: str) -> int:
    found = re.fullmatch(_NAMES[period], name)
    if found is None or found[1] == "0000":
        raise ConfigError(key, name, f"must be a {period}, such as {_EXAMPLES[period]}")
    return (12 * int(found[1])) // MONTHS[period] + int(found[2] or 1) - 1


@spec
class Cohorts:
    """The arrival cohorts that a run admits.  Each of these cohorts is charged, whether or not it has members.

    Attributes:
        period: the calendar by which people join the population: "month", "quarter" or "year".
        first: the first cohort, such as "2026", "2026-Q1" or "2026-03"; null: the oldest cohort, which includes people
            without a date.
        last: the last cohort, in the same form.
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
        first = OLDEST if self.first is None else _parse_period("first", self.first, self.period)
        return first, _parse_period("last", self.last, self.period)

    def __contains__(self, cohort: int) -> bool:
        first, last = self.span
        return first <= cohort <= last

    def __str__(self) -> str:
        """Format the range as ledger entries store it: `..2026`, `2025..2026`."""
        return f"{self.first or ''}..{self.last}"

    @classmethod
    def from_text(cls, said: str, period: str) -> Cohorts:
        """Parse the text that `str` produced.

        Raises:
            ConfigError: the text has another form.
        """
        first, _, last = said.partition("..")
        return decode(cls, {"period": period, "first": first or None, "last": last})


def find_cohort_group_starts(admissions: Iterable[Cohorts | None], *, oldest_apart: bool = False) -> list[int]:
    """Return the first cohort of each group of cohorts that take part in the same `admissions`, in ascending order.

    An admission of None admits everybody.  With `oldest_apart` the oldest cohort gets a group of its own, because it
    may also owe charges of runs that did not admit it.

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


def shift_window(cohorts: Cohorts, *, by: int = 1) -> Cohorts:
    """Shift the window by `by` periods and keep its length; a window that begins with the oldest cohort grows instead.

    >>> str(moved(Cohorts(period="quarter", first="2025-Q4", last="2026-Q3")))
    '2026-Q1..2026-Q4'
    """
    (first, last), period = cohorts.span, cohorts.period
    # No period comes after the year 9999: a window up to there, which has no end, keeps it.
    begins, ends = (
        format_cohort_name(min(one + by, compute_period_number(date.max, period)), period) for one in (first, last)
    )
    return Cohorts(period=period, first=None if first == OLDEST else begins, last=ends)


def shift_to_next_window(before: Cohorts, *, real: bool) -> Cohorts:
    """Shift the window by one period; at `real` sites, only into a period that has already begun.

    To charge people of a later period, the lead has to name the window, so that repeating a command never does it by
    accident.

    Raises:
        ConfigError: the sites are real, and the next period has not begun.
    """
    after = shift_window(before)
    if real and after.span[1] > compute_period_number(datetime.now(UTC), after.period):
        first = "" if after.first is None else f"privacy.cohorts.first={after.first} "
        bound = f"has not begun, and --renew would charge this {after.period} next. To charge it now, set"
        bound += f" the window: {first}privacy.cohorts.last={after.last}"
        raise ConfigError("privacy.cohorts.last", after.last, bound)
    return after

"""Arrival cohorts: the people of a population, grouped by the calendar period in which they joined.

A run names the cohorts that it admits, and charges only these cohorts. `compute_period_number` numbers the cohorts, so
that consecutive periods have consecutive numbers; cohort 0 contains everybody without a date.
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
MONTHS = {"month": 1, "quarter": 3, "year": 12}  # length of each period in months
OLDEST = 0  # the cohort of people without a date, before all others
_NAMES = {"month": r"([0-9]{4})-(0[1-9]|1[0-2])", "quarter": r"([0-9]{4})-Q([1-4])", "year": r"([0-9]{4})()"}
_EXAMPLES = {"month": "2026-03", "quarter": "2026-Q1", "year": "2026"}


def compute_period_number(moment: date, period: str) -> int:
    """Return the number of the calendar period that contains a UTC date.

    Consecutive periods have consecutive numbers.
    """
    return (12 * moment.year + moment.month - 1) // MONTHS[period]


def compute_cohort_number(month: str, period: str) -> int:
    """Return the cohort number of a person who joined in `month`, such as "2026-03".

    The result is cohort 0 if `month` is empty.
    """
    return compute_period_number(date.fromisoformat(f"{month}-01"), period) if month else OLDEST


def format_cohort_name(cohort: int, period: str) -> str:
    """Format a cohort's name for a plan: "2026", "2026-Q1" or "2026-03"; "before" for the oldest cohort.

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
    match = re.fullmatch(_NAMES[period], name)
    if match is None or match[1] == "0000":
        raise ConfigError(key, name, f"must be a {period}, such as {_EXAMPLES[period]}")
    return (12 * int(match[1])) // MONTHS[period] + int(match[2] or 1) - 1


@spec
class Cohorts:
    """The range of arrival cohorts that a run admits.

    The run charges every cohort in the range, even a cohort without members.

    Attributes:
        period: length of the calendar periods: "month", "quarter" or "year".
        first: the first cohort, such as "2026", "2026-Q1" or "2026-03"; null: the oldest cohort, which includes people
            without a date.
        last: the last cohort, in the format of `first`.
    """

    period: Calendar
    last: str
    first: str | None = None

    def __post_init__(self) -> None:
        first, last = self.span
        require("last", self.last, first <= last, f"must not be before first = {self.first}")

    @property
    def span(self) -> tuple[int, int]:
        """The numbers of the first and the last cohort in the range."""
        first = OLDEST if self.first is None else _parse_period("first", self.first, self.period)
        return first, _parse_period("last", self.last, self.period)

    def __contains__(self, cohort: int) -> bool:
        first, last = self.span
        return first <= cohort <= last

    def __str__(self) -> str:
        """Format the range as in ledger entries: `..2026`, `2025..2026`."""
        return f"{self.first or ''}..{self.last}"

    @classmethod
    def from_text(cls, text: str, period: str) -> Cohorts:
        """Parse the output of `__str__`.

        Raises:
            ConfigError: the text is not a range of cohorts.
        """
        first, _, last = text.partition("..")
        return decode(cls, {"period": period, "first": first or None, "last": last})


def find_cohort_group_starts(admissions: Iterable[Cohorts | None], *, oldest_apart: bool = False) -> list[int]:
    """Group the cohorts that the same runs admit, and return each group's first cohort in ascending order.

    Args:
        admissions: the cohorts that each run admits; None admits everybody.
        oldest_apart: put the oldest cohort into a group of its own, because a restore may have charged it for runs that
            did not admit it.

    >>> year = [Cohorts(period="year", first=None, last="2025"), Cohorts(period="year", first="2025", last="2026")]
    >>> find_cohort_group_starts(year), find_cohort_group_starts([None])
    ([0, 2025, 2026, 2027], [0])
    """
    begins = {OLDEST, OLDEST + 1} if oldest_apart else {OLDEST}
    for admitted in admissions:
        if admitted is not None:
            first, last = admitted.span
            begins |= {first, last + 1}
    return sorted(begins)


def shift_window(cohorts: Cohorts, *, by: int = 1) -> Cohorts:
    """Shift a window of cohorts by `by` periods without changing its length.

    A window without a first cohort grows instead.

    >>> str(shift_window(Cohorts(period="quarter", first="2025-Q4", last="2026-Q3")))
    '2026-Q1..2026-Q4'
    """
    (first, last), period = cohorts.span, cohorts.period
    # `date` ends with the year 9999, so a window up to that year keeps its end.
    begins, ends = (
        format_cohort_name(min(index + by, compute_period_number(date.max, period)), period) for index in (first, last)
    )
    return Cohorts(period=period, first=None if first == OLDEST else begins, last=ends)


def shift_to_next_window(before: Cohorts, *, real: bool) -> Cohorts:
    """Shift the window of cohorts by one period. At `real` sites, the new last period must have begun.

    A lead has to name the window explicitly to charge people of a later period, so that a repeated command never
    charges them by accident.

    Raises:
        ConfigError: the sites are real, and the next period has not begun.
    """
    after = shift_window(before)
    if real and after.span[1] > compute_period_number(datetime.now(UTC), after.period):
        first = "" if after.first is None else f"privacy.cohorts.first={after.first} "
        bound = f"has not begun yet, so --renew does not charge this {after.period} by default. To charge it now, set"
        bound += f" the window: {first}privacy.cohorts.last={after.last}"
        raise ConfigError("privacy.cohorts.last", after.last, bound)
    return after

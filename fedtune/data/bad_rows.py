"""Counts of unusable rows by reason, without any content of a record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedtune.formatting import pluralize
from fedtune.spec import DataError

MUCH = 0.1  # share of a file's rows; if more rows are unusable, a setting or the file is probably wrong
_MAX_REASONS, _MAX_LINES = 3, 5  # maximum numbers in a message


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedRows:
    """Counts for data files: the total number of rows, and the number of unusable rows by reason."""

    rows: int = 0  # total number of rows in the files
    # reason -> number of unusable rows, most frequent first
    reasons: Mapping[str, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return sum(self.reasons.values())

    @property
    def exceeds_threshold(self) -> bool:
        return self.count > MUCH * self.rows

    def merge_counts(self, other: SkippedRows) -> SkippedRows:
        reasons = Counter(self.reasons) + Counter(other.reasons)
        return SkippedRows(rows=self.rows + other.rows, reasons=dict(reasons.most_common()))

    def __str__(self) -> str:
        """Format the counts: `30 of 900 rows (3.3 %) cannot be used: 20 must not be blank (role text); 10 ...`."""
        rows = f"{self.count:,} of {pluralize(self.rows, 'row')} ({100 * self.count / max(1, self.rows):.1f} %)"
        subject = f"A LARGE PART, {rows}," if self.exceeds_threshold else rows
        return f"{subject} cannot be used: {_format_reasons(self.reasons)}"


NONE_LEFT_OUT = SkippedRows()


class Faults:
    """Collector of errors from unusable rows while a file is read."""

    def __init__(self) -> None:
        self._first: DataError | None = None
        self._reasons: Counter[str] = Counter()
        self._lines: list[int] = []

    def __bool__(self) -> bool:
        return self._first is not None

    def add(self, error: DataError, line: int) -> None:
        self._first = self._first or error
        # The part after a semicolon is advice, which may differ from row to row.
        self._reasons[error.bound.partition("; ")[0]] += 1
        if len(self._lines) < _MAX_LINES and line not in self._lines:
            self._lines.append(line)

    def summarize(self, *, used: int) -> SkippedRows:
        """Return the counts of skipped rows, given the number of usable rows."""
        return SkippedRows(rows=used + self._reasons.total(), reasons=dict(self._reasons.most_common()))

    def raise_if_any(self) -> None:
        """Raise a DataError if any row is unusable."""
        if error := self.build_error():
            raise error

    def build_error(self) -> DataError | None:
        """Describe the first unusable row, with the total, the first lines and the reasons; None without such a row."""
        if self._first is None:
            return None
        first, num, more = self._first, self._reasons.total(), ", ..." if self._reasons.total() > _MAX_LINES else ""
        several = f": {_format_reasons(self._reasons)}" if len(self._reasons) > 1 else ""
        all_of_them = f"{num:,} rows cannot be used, in lines {', '.join(map(str, self._lines))}{more}{several}"
        bound = f"{first.bound} ({all_of_them})" if num > 1 else first.bound
        return DataError(first.key, first.value, bound)


def _format_reasons(reasons: Mapping[str, int]) -> str:
    most = Counter(reasons).most_common()
    rest = sum(count for _, count in most[_MAX_REASONS:])
    shown = "; ".join(f"{count:,} {reason}" for reason, count in most[:_MAX_REASONS])
    return f"{shown}; {rest:,} others" if rest else shown

"""Fixed sets of micro-batch shapes, chosen by public settings, so that no record changes another record's kernels.

Rounding depends on the shapes of a computation.  Therefore a record is padded to a length that depends only on its own
number of tokens, and each micro-batch is filled with empty rows to one of a few allowed numbers of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

_SHORTEST = 12
_STEPS = (4, 5, 6)
"""Padded lengths are these multiples of powers of two.  Padding adds at most a third to a record, and at most half
below the last length; shorter records are padded to `_SHORTEST`.
"""
_TOKENS_OF_A_CALL = 100  # fixed cost of a micro-batch, in tokens; tuned for the fastest steps with MiniLM


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """A micro-batch: the indices of its records, and its shape."""

    places: npt.NDArray[np.int64]  # indices of at most `rows` records, in the order of the rows
    rows: int  # number of rows, one per record with all its texts; the remaining rows are empty
    # padded length of each text in tokens, which depends on the record's own tokens only
    length: int


@dataclass(frozen=True)
class Shapes:
    """The allowed shapes of a run's micro-batches.

    Every micro-batch contains at least one padding token.  Attention without padding uses another code path, so without
    this rule a record would be computed differently in a batch with shorter records.
    """

    lengths: tuple[int, ...]  # the padded lengths, ascending; the last length fits the longest record
    max_tokens: int  # maximum of rows times length, unless the minimum of rows (1, or 2 at `full`) exceeds it
    # the length that a record may fill completely, because the model has no further position; 0: no such length.
    # A micro-batch of this length always has an empty row.
    full: int = 0
    most_rows: tuple[int, ...] = ()  # maximum rows that fit into memory, by length; empty: limited by `max_tokens`
    # a micro-batch has the number of rows that `max_tokens` allows or, for the remainder, one of these fractions
    row_shares: tuple[int, ...] = (1, 2, 4, 8)
    fixed: bool = False  # all records have the same length, so without padding there is a single code path

    @classmethod
    def from_limits(
        cls, *, max_length: int, max_tokens: int, positions: int | None = None, fixed: bool = False
    ) -> Shapes:
        """Choose the shapes for records of at most `max_length` tokens, on a model with `positions` positions.

        With `fixed`, every record has exactly `max_length` tokens.
        """
        if fixed:
            return cls(lengths=(max_length,), max_tokens=max_tokens, full=max_length, fixed=True)
        roomy = 8 * (max_length // 8 + 1)  # room for at least one token of padding
        if positions is not None:
            roomy = max(max_length, min(roomy, positions))
        # A length closer to the last length would fit few additional records, and still cost a call of its own.
        steps = (2**power * step for power in range(roomy.bit_length()) for step in _STEPS)
        shorter = tuple(step for step in steps if _SHORTEST <= step < 0.8 * roomy and step % 4 == 0)
        return cls(lengths=(*shorter, roomy), max_tokens=max_tokens, full=roomy if roomy == max_length else 0)

    def compute_longest_record(self, length: int) -> int:
        """Return the maximum number of tokens of a record that is padded to `length`."""
        return length - (length != self.full)

    def rows(self, length: int) -> tuple[int, ...]:
        """Return the allowed micro-batch sizes for this sequence length, in descending order."""
        fewest, most = self.compute_min_rows(length), self.max_tokens // length
        if self.most_rows:
            most = min(most, self.most_rows[self.lengths.index(length)])
        return tuple(sorted({max(fewest, most // share) for share in self.row_shares}, reverse=True))

    def compute_min_rows(self, length: int) -> int:
        """Return the number of rows of the smallest micro-batch of this length."""
        return 1 + self._count_padding_rows(length)

    def capacity(self, length: int, rows: int) -> int:
        """Return the number of records that fit into a micro-batch of this shape."""
        return rows - self._count_padding_rows(length)

    def _count_padding_rows(self, length: int) -> int:
        """Return the number of rows that stay empty to provide padding."""
        return int(length == self.full and not self.fixed)

    def cut(self, places: npt.NDArray[np.int64], num_tokens: npt.NDArray[np.integer]) -> Iterator[MicroBatch]:
        """Cut a logical batch into micro-batches; every index is returned exactly once, in order within each length.

        Args:
            places: indices of records in the data set.
            num_tokens: the number of tokens in the longest text of each record of the data set.
        """
        bucket = np.searchsorted([self.compute_longest_record(length) for length in self.lengths], num_tokens[places])
        assert (bucket < len(self.lengths)).all(), "a record exceeds the maximum length of tokenization"
        for number, length in enumerate(self.lengths):
            yield from self._cut_length(places[bucket == number], length)

    def _cut_length(self, places: npt.NDArray[np.int64], length: int) -> Iterator[MicroBatch]:
        most = self.rows(length)[0]
        room = self.capacity(length, most)
        while len(places) >= 2 * room:
            yield MicroBatch(places[:room], most, length)
            places = places[room:]
        for rows in _find_cheapest_rows(self, length, len(places)):
            room = self.capacity(length, rows)
            yield MicroBatch(places[:room], rows, length)
            places = places[room:]


@cache
def _find_cheapest_rows(shapes: Shapes, length: int, count: int) -> tuple[int, ...]:
    """Find the cheapest split of `count` records into micro-batches; return their numbers of rows, descending."""
    if count <= 0:
        return ()
    ways = (
        (rows, *_find_cheapest_rows(shapes, length, count - shapes.capacity(length, rows)))
        for rows in shapes.rows(length)
    )
    best = min(ways, key=lambda way: sum(rows * length + _TOKENS_OF_A_CALL for rows in way))
    return tuple(sorted(best, reverse=True))

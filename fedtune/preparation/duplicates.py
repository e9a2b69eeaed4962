"""The records that say what an earlier one said: the same by a digest, or almost by MinHash, both in bounded memory.

A record is compared with those before it, so that what is found of it depends on them.  That is why no run does this:
one record more would change what becomes of another.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, TypeAlias

from fedtune.data.records import Record
from fedtune.data.values import one_form

Mark: TypeAlias = tuple[str, str]  # a record's use and its answer; records of one mark are told from those of another
SAME = 0.8  # texts are alike that share so much of their runs of five letters (Jaccard)
MOST_SAME, MOST_ALIKE, MOST_LETTERS = 500_000, 100_000, 20_000_000
"""Records that are compared at most, and of those that are alike also letters: about 150 MB each, and a minute."""
_RUN = 5
_LEAST, _FIRST = 20, 2_000
"""Of a text's letters: with fewer, one word decides how alike two texts are; more than the first are not compared."""
_BANDS, _ROWS = 16, 6
"""Of a MinHash: texts as alike as `SAME` meet in a band 99 times of 100, and are then compared in whole."""
_MOST_COMPARED = 50


class Twin(NamedTuple):
    """An earlier record, and the line of its file on which it stands."""

    mark: Mark
    line: int


Likeness = Literal["same", "alike"]


class Earlier:
    """The records so far."""

    def __init__(self, *, alike: bool) -> None:
        self._same: dict[bytes, tuple[Twin, ...]] = {}
        self._index = _Index() if alike else None

    @property
    def is_full(self) -> bool:
        """Later records were no longer noted."""
        return len(self._same) >= MOST_SAME or (self._index is not None and self._index.is_full)

    def twins(self, record: Record, use: str = "", *, keep: bool = True) -> dict[Likeness, tuple[Twin, ...]]:
        """The earlier records, one of each mark, that say the same, and almost; the record is then one, too, if kept.

        Files are told apart by their `use`.
        """
        text = record.said
        twin = Twin((use, record.answer), record.line)
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        same = self._same.get(digest, ())
        if keep and all(one.mark != twin.mark for one in same) and len(self._same) < MOST_SAME:
            self._same[digest] = (*same, twin)
        return {"same": same, "alike": self._index.twins(text, twin, keep) if self._index else ()}


class _Index:
    """MinHashes of records that are not alike, so that a file of one template stays as quick as any other."""

    def __init__(self) -> None:
        from datasketch import MinHash, MinHashLSH

        self._lsh = MinHashLSH(num_perm=_BANDS * _ROWS, params=(_BANDS, _ROWS))
        self._empty = MinHash(num_perm=_BANDS * _ROWS, hashfunc=zlib.crc32)
        self._noted: list[tuple[Twin, Any]] = []
        self._letters = 0

    @property
    def is_full(self) -> bool:
        return len(self._noted) >= MOST_ALIKE or self._letters >= MOST_LETTERS

    def twins(self, text: str, twin: Twin, keep: bool) -> tuple[Twin, ...]:
        """One of each mark; the record is noted unless it is alike to one of its own mark."""
        letters = text[:_FIRST].casefold()
        if len(letters) < _LEAST or self._letters >= MOST_LETTERS:
            return ()
        self._letters += len(letters)
        minhash = self._empty.copy()
        minhash.update_batch({letters[place : place + _RUN].encode() for place in range(len(letters) - _RUN + 1)})
        found: dict[Mark, Twin] = {}
        for number in sorted(self._lsh.query(minhash))[:_MOST_COMPARED]:
            other, its = self._noted[number]
            if other.mark not in found and minhash.jaccard(its) >= SAME:
                found[other.mark] = other
        if keep and twin.mark not in found and not self.is_full:
            self._lsh.insert(len(self._noted), minhash, check_duplication=False)
            self._noted.append((twin, minhash))
        return tuple(found.values())


def spelling(label: str) -> str:
    """A label without differences of case, spaces, form, invisible letters or `.0` of a number."""
    text = unicodedata.normalize("NFKC", one_form(label)).casefold()
    return "".join(re.sub(r"^([+-]?\d+)\.0+$", r"\1", text).split())


def spelt_alike(labels: Iterable[str]) -> list[list[str]]:
    """Labels that are probably meant as one.

    >>> spelt_alike(["billing", "Sales", "Billing"])
    [['billing', 'Billing']]
    """
    together: defaultdict[str, list[str]] = defaultdict(list)
    for label in labels:
        together[spelling(label)].append(label)
    return [some for some in together.values() if len(some) > 1]


def has_datasketch() -> bool:
    """The library that finds near-duplicates is there."""
    return importlib.util.find_spec("datasketch") is not None

"""Detection of duplicates by digest, of near-duplicates by MinHash, and of shared word sequences.

Each record is compared with earlier records, so its result depends on other records.  Runs never deduplicate, because
adding a record would change the treatment of other records.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from fedtune.data.records import Record
from fedtune.data.text_rows import format_location
from fedtune.data.values import UNSPACED, normalize_name
from fedtune.extras import is_installed
from fedtune.lab.preparation.patterns import find_identifiers

SAME = 0.8  # Jaccard similarity of character 5-grams above which texts are near-duplicates
MAX_SAME, MAX_ALIKE, MAX_LETTERS = 500_000, 100_000, 20_000_000
"""Limits for comparisons: records, records with MinHashes, and their letters; about 150 MB each, and a minute."""
_RUN = 5
_LEAST, _FIRST = 20, 2_000
"""Minimum letters of a text for a comparison (one word dominates shorter texts), and number of compared letters."""
_BANDS, _ROWS = 16, 6
"""MinHash bands and rows: texts with similarity `SAME` share a band with 99 % probability, and are then compared."""
_MAX_COMPARED = 50
_WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
"""A sequence of letters and digits; in scripts without spaces, such as Chinese, a single letter."""
Words = list[str | None]  # words of a record; None terminates each text
Likeness = Literal["same", "alike"]


class Twin(NamedTuple):
    """An earlier record with the same or similar content."""

    use: str
    answer: str
    line: int  # line in its file


class Earlier:
    """An index of earlier records by digest; with `alike`, also by MinHash, with one entry per group of
    near-duplicates.
    """

    def __init__(self, *, alike: bool) -> None:
        self._same: dict[bytes, tuple[Twin, ...]] = {}
        self._noted: list[tuple[Twin, Any]] = []
        self._letters, self._index = 0, None
        if alike:
            from datasketch import MinHash, MinHashLSH

            self._index = MinHashLSH(num_perm=_BANDS * _ROWS, params=(_BANDS, _ROWS))
            self._empty = MinHash(num_perm=_BANDS * _ROWS, hashfunc=zlib.crc32)

    @property
    def is_full(self) -> bool:
        """Whether the index is full, so that later records are not stored."""
        return len(self._same) >= MAX_SAME or len(self._noted) >= MAX_ALIKE or self._letters >= MAX_LETTERS

    def find_twins(self, record: Record, use: str = "", *, keep: bool = True) -> dict[Likeness, tuple[Twin, ...]]:
        """Find the earlier duplicates and near-duplicates of a record, at most one per use and answer.

        If `keep` is set, the record is then added to the index.
        """
        text, twin = record.full_text, Twin(use, record.target_key, record.line)
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        same = self._same.get(digest, ())
        if keep and all(one[:2] != twin[:2] for one in same) and len(self._same) < MAX_SAME:
            self._same[digest] = (*same, twin)
        return {"same": same, "alike": self._find_similar(text, twin, keep)}

    def _find_similar(self, text: str, twin: Twin, keep: bool) -> tuple[Twin, ...]:
        letters = text[:_FIRST].casefold()
        if self._index is None or len(letters) < _LEAST or self._letters >= MAX_LETTERS:
            return ()
        self._letters += len(letters)
        minhash = self._empty.copy()
        minhash.update_batch({letters[place : place + _RUN].encode() for place in range(len(letters) - _RUN + 1)})
        found: dict[tuple[str, str], Twin] = {}
        for number in sorted(self._index.query(minhash))[:_MAX_COMPARED]:
            other, its = self._noted[number]
            if other[:2] not in found and minhash.jaccard(its) >= SAME:
                found[other[:2]] = other
        # A near-duplicate with the same use and answer is not added to the index.
        has_room = len(self._noted) < MAX_ALIKE and self._letters < MAX_LETTERS
        if keep and has_room and twin[:2] not in found:
            self._index.insert(len(self._noted), minhash, check_duplication=False)
            self._noted.append((twin, minhash))
        return tuple(found.values())


def normalize_spelling(label: str) -> str:
    """Normalize a label's case, whitespace, Unicode form, invisible characters, and `.0` of an integer."""
    text = unicodedata.normalize("NFKC", normalize_name(label)).casefold()
    return "".join(re.sub(r"^([+-]?\d+)\.0+$", r"\1", text).split())


# Comparison of synthetic records with a site's own records, for the site only.


@dataclass(frozen=True, slots=True)
class Near:
    """A synthetic record and its closest matches among other records, with their locations."""

    place: str
    words: int  # length of the longest common word sequence
    share: float  # fraction of the record's words in this sequence
    run: str  # the longest common word sequence
    of: str  # location of the other record with this sequence
    likeness: str  # "same": duplicate; "alike": near-duplicate
    twin: str
    details: list[tuple[str, int, str]]  # shared identifiers: (kind, number of other records, location of the first)


def find_longest_runs(texts: Iterable[Words], others: Iterable[tuple[str, Words]]) -> Iterator[tuple[int, int, str]]:
    """Yield for each text its longest common word sequence with another text.

    Uses a suffix automaton, with time linear in the number of all words and memory linear in the words of `texts`.

    Yields:
        (length in words, end position, location of the other text).
    """
    # For each state: transitions by word, suffix link, and length of its longest word sequence.
    steps, link, size = [dict[str | int | None, int]()], [-1], [0]
    ends, last = list[list[int]](), 0
    for number, text in enumerate(texts):
        ends.append([])
        for word in (number if word is None else word for word in text):  # a number separates texts
            at, last = last, len(steps)
            ends[-1].append(last)
            steps.append({})
            link.append(0)
            size.append(size[at] + 1)
            while at >= 0 and word not in steps[at]:
                steps[at][word] = last
                at = link[at]
            link[last] = suffix = steps[at][word] if at >= 0 else 0
            if at >= 0 and size[suffix] > size[at] + 1:  # split the state
                steps.append(dict(steps[suffix]))
                link.append(link[suffix])
                size.append(size[at] + 1)
                link[last] = link[suffix] = len(steps) - 1
                while at >= 0 and steps[at].get(word) == suffix:
                    steps[at][word] = link[last]
                    at = link[at]
    best = [(0, "")] * len(steps)
    for place, read in others:
        at = length = 0
        for its in read:
            while (then := steps[at].get(its)) is None and at:
                at = link[at]
                length = size[at]
            if then is not None:
                at, length = then, length + 1
                if length > best[at][0]:
                    best[at] = length, place
    by_size = sorted(range(1, len(steps)), key=size.__getitem__)
    for at in reversed(by_size):  # a matched sequence also matches its suffixes
        best[link[at]] = max(best[link[at]], (min(best[at][0], size[link[at]]), best[at][1]))
    for at in by_size:
        best[at] = best[at] if best[at][0] else best[link[at]]
    yield from (max((best[at][0], end, best[at][1]) for end, at in enumerate(states, 1)) for states in ends)


def compare_records(records: Sequence[Record], others: Iterable[Record]) -> list[Near]:
    """Compare records with a stream of other records; return them by the length of the longest common word sequence."""
    texts = list(map(split_words, records))
    having = {detail: list[str]() for one in records for detail in _find_details(one)}
    earlier, twins = Earlier(alike=is_installed("datasketch")), dict[str, tuple[str, str]]()
    for number, one in enumerate(records):
        earlier.find_twins(one, str(number))  # distinct uses, so that every record is indexed

    def read() -> Iterator[tuple[str, Words]]:
        for other in others:
            place = format_location(other.file, other.line)
            for likeness, some in earlier.find_twins(other, keep=False).items():
                for its, *_ in some:
                    twins[its] = max(twins.get(its, ("", "")), (likeness, place), key=lambda twin: twin[0])
            for detail in _find_details(other) & having.keys():
                having[detail].append(place)
            yield place, split_words(other)

    near = []
    for number, (words, end, place) in enumerate(find_longest_runs(texts, read())):
        one, text, twin = records[number], texts[number], twins.get(str(number), ("", ""))
        share, run = words / max(1, len(text) - text.count(None)), " ".join(map(str, text[end - words : end]))
        found = {(kind, form): having[kind, form] for kind, form in sorted(_find_details(one))}
        details = [(kind, len(some), some[0]) for (kind, _), some in found.items() if some]
        of = place if words else ""
        near.append(Near(format_location(one.file, one.line), words, share, run, of, *twin, details))
    return sorted(near, key=lambda one: (-one.words, -one.share))


def split_words(record: Record) -> Words:
    """Split a record's texts into words with normalized case and Unicode form, without punctuation."""
    plain = (re.sub("['\u2019]", "", unicodedata.normalize("NFKC", text).casefold()) for _, text in record.texts())
    return [word for text in plain for word in (*_WORD.findall(text), None)]


def _find_details(record: Record) -> set[tuple[str, str]]:
    """Find likely identifiers as (kind, normalized form): letters and digits only, except for e-mail addresses."""
    found = ((kind, text[a:b]) for _, text in record.texts() for kind, a, b in find_identifiers(text))
    return {(kind, (text if kind == "e-mail" else re.sub(r"[\W_]", "", text)).casefold()) for kind, text in found}

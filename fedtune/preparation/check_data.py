"""Faults and oddities of an experiment's records, for the eyes of those who hold them.

What is found are counts, lines and names of columns; no record's text is among it, since a page may be passed around.
The counts are exact, and no noise protects them.  Nothing is dropped or changed, and no run reads any of it.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from fedtune.config import RunConfig
from fedtune.data.faults import Faults, LeftOut
from fedtune.data.formats import format_of, raw_rows
from fedtune.data.load import lead_side, shipped_folders, split_key
from fedtune.data.marked import entities_of, entity_types
from fedtune.data.partition import assign_site, is_heldout, is_selected
from fedtune.data.records import Record, chunks, judged, resolve_file
from fedtune.data.spec import SITE
from fedtune.data.tokenise import UNSUPERVISED, TextDataset, Tokenizer
from fedtune.data.values import split_labels
from fedtune.preparation import duplicates
from fedtune.preparation.duplicates import Earlier, Likeness, spelling
from fedtune.preparation.patterns import OddTexts, damage, identifiers
from fedtune.spec import DataError
from fedtune.tasks.inputs import input_of
from fedtune.tasks.registry import task_named

SHOWN = 20  # errors that are kept of a file, and lines of a finding
_MOST_TOKENS = 8_192  # up to which lengths are told apart
_BINS = 10
_USES = ("train", "held out", "validation", "test", "unused")
INSTALL = "pip install 'fedtune[data]'"
Kind = Literal[
    "cut", "lost", "unlearnt", "scheme", "hidden", "overlap", "near_overlap", "contradiction", "same", "alike",
    "shared", "declared", "personal", "damage",
]  # fmt: skip
_KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something that records of a file have in common."""

    kind: Kind
    what: str  # within the kind, such as "e-mail"
    column: str  # where it stands; empty: in the record as a whole
    count: int = 0
    # of the first of them, or their rows, with that of the earlier record that each is like, if any
    lines: tuple[tuple[int, int | None], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Tokens of the records of a file, before any are cut."""

    median: int
    most_of_them: int  # the quantile 0.9
    longest: int
    bins: tuple[tuple[int, int, int], ...]  # (fewest tokens, most tokens, records) of equal steps, ascending


@dataclass(frozen=True, kw_only=True, slots=True)
class FileCheck:
    """One file."""

    path: str
    places: str  # what numbers of places count: "lines", or the "rows" of a file whose rows may share a line
    rows: int  # in it
    # records that can be used, by what for: "train", "held out" by its site, "validation", "test", or "unused"
    uses: Mapping[str, int]
    # what is wrong with the first rows that cannot be used: (file, line and field; what is there; bound)
    errors: tuple[tuple[str, str, str], ...]
    num_errors: Mapping[str, int]  # all such rows by what a run needs
    findings: tuple[Finding, ...]
    labels: Mapping[str, int]  # records of each declared label
    # by declared label, rows whose own is undeclared and differs in case and spaces alone
    spelt_otherwise: Mapping[str, int]
    lengths: Lengths | None  # None: no record can be used

    @property
    def left_out(self) -> LeftOut:
        return LeftOut(rows=self.rows, reasons=self.num_errors)


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteSize:
    """A site's declared size, and the records (or users) that it would train on."""

    site: str
    declared: int
    true: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """All that was found: in the files of training, validation and test, and what was not looked at (`skipped`)."""

    max_length: int
    files: tuple[FileCheck, ...]
    sizes: tuple[SiteSize, ...]
    skipped: tuple[str, ...]


def check(config: RunConfig, tokenizer: Tokenizer, *, within: int) -> Checked:
    """Read the files of an experiment as a run would, and look at each record; token ids must be below `within`.

    A DataError is raised only for what is a fault of a file and of no record, such as a missing one.
    """
    look = _Look(config, tokenizer, within)
    files = tuple(look.file(path, use, site) for path, use, site in _files(config))
    declared = config.declared_sizes().items()
    sizes = tuple(SiteSize(site=site, declared=size, true=len(look.units[site])) for site, size in declared)
    return Checked(max_length=config.data.max_length, files=files, sizes=sizes, skipped=tuple(look.skipped()))


def _files(config: RunConfig) -> Iterator[tuple[Path, str, str]]:
    """(file, what it is used for, the site whose file it is) of each; no site: it is dealt out, or the lead's."""
    data = config.data
    sites = config.federation.names if data.partition.kind == "file" else ("",)
    files = [("train", data.train_file.replace(SITE, site), site) for site in sites]
    files += [(use, name, "") for use, name in (("validation", data.validation_file), ("test", data.test_file)) if name]
    for use, name, site in files:
        path = resolve_file(name, shipped_folders(), key=f"data.{use}_file")
        # From the working folder, where it lies in that: it stands before each error.
        yield (path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path), use, site


_ACROSS: Mapping[Likeness, Kind] = {"same": "overlap", "alike": "near_overlap"}


class _Look:
    """A look at the files of one experiment, one after another."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, within: int) -> None:
        self.task, self._config, self._data = task_named(config.task), config, config.data
        self.task.check_tokenizer(tokenizer, data=config.data)
        self._tokenizer, self._within = tokenizer, within
        self._fault, self._key = self.task.fault(config.data), split_key(config.seed)
        self._earlier = Earlier(alike=duplicates.has_datasketch())
        self.units: defaultdict[str, set[object]] = defaultdict(set)  # that each site would train on: users, or numbers

    def file(self, path: Path, use: str, site: str) -> FileCheck:
        data, unit, form = self._data, self._config.privacy.unit, format_of(path)
        rows, faults, errors, found = 0, Faults(), list[tuple[str, str, str]](), _Findings()
        uses, spelt_otherwise = Counter[str](), Counter[str]()
        labels = Counter(dict.fromkeys(data.labels, 0))
        spellings = {spelling(label): label for label in reversed(data.labels)}
        lengths: list[int] = []
        texts: dict[bytes, tuple[int, int]] = {}  # by digest: the first line, and records that have it

        def fault(record: Record) -> DataError | None:
            error = self._fault(record)
            if error is not None:  # perhaps by a label that is a declared one but for case and spaces
                unknown = {spelling(label) for label in self._labels(record) if label not in labels}
                spelt_otherwise.update(spellings[one] for one in unknown & spellings.keys())
            elif data.partition.kind == "column" and record.fields.get("site") not in (*data.partition.sites, None):
                error = DataError(record.at("site"), "another site", "must be one of data.partition.sites")
            return error

        def usable() -> Iterator[Record]:
            """The records that a run can use; the others are errors, which quote nothing of them."""
            nonlocal rows
            for line, one in judged(path, self.task.columns(data, partition=use == "train", unit=unit), fault=fault):
                rows += 1
                if isinstance(one, Record):
                    yield replace(one, line=rows) if form == ".json" else one
                    continue
                faults.add(one, line)
                if len(errors) < SHOWN:
                    where = f"row {rows} ({one.key})" if form == ".json" else one.key
                    errors.append((where, str(one.value), one.bound))

        for some in chunks(usable()):
            its_uses = [self._use(record, site) if use == "train" else use for record in some]
            uses.update(its_uses)
            lengths += self._note_tokens(some, found)
            for record, its in zip(some, its_uses, strict=True):
                labels.update(label for label in self._labels(record) if label in labels)
                self._note_twins(record, its, found)
                if entities_of(record.fields.get("tags", "O").split("\n"), data.labels)[1]:
                    found.note(record.line, "scheme")
                if self.task.texts(data) > data.windows:
                    _note_shared_texts(record, texts, found)
                for what, column in input_of(data).odd(record, data):
                    found.note(record.line, "declared", what, column)
                odd: dict[tuple[Kind, str, str], None] = {}
                for role, text in record.texts():
                    odd |= dict.fromkeys(("personal", one.kind, role) for one in identifiers(text))
                    odd |= dict.fromkeys(("damage", what, role) for what in damage(text))
                for kind, what, role in odd:
                    found.note(record.line, kind, what, data.columns[role])
        # What the rows say beside what a run reads of them.
        odd_texts = OddTexts(form)
        for number, (line, row) in enumerate(raw_rows(path, lenient=True), 1):
            if not isinstance(row, DataError):
                odd_texts.note(row, number if form == ".json" else line)
        for (what, column), lines in odd_texts.lines.items():
            for line in lines:
                found.note(line, "damage", what, column)
        if shared := found.get(("shared", "", "")):
            most = max(count for _, count in texts.values())
            found["shared", "", ""] = replace(shared, what=f"(one is in {most:,})")
        return FileCheck(
            path=str(path),
            places="lines" if form in (".jsonl", ".csv", ".tsv") else "rows",
            rows=rows,
            uses={use: uses[use] for use in _USES if use in uses},
            errors=tuple(errors),
            num_errors=faults.left_out(used=0).reasons,
            findings=tuple(sorted(found.values(), key=lambda one: _KINDS.index(one.kind))),
            labels=dict(labels),
            spelt_otherwise=dict(spelt_otherwise.most_common()),
            lengths=_lengths(np.sort(lengths)) if lengths and data.max_length > 1 else None,
        )

    def _labels(self, record: Record) -> tuple[str, ...]:
        if "labels" in record.fields:
            return split_labels(record.fields["labels"], separator=self._data.label_separator)
        if "label" in record.fields:
            return (record.fields["label"],)
        return tuple(entity_types(record.fields, self._data.labels))

    def _use(self, record: Record, site: str) -> str:
        """The use of a record of a training file; one that is trained on counts for its site."""
        data, unit = self._data, self._config.privacy.unit
        if side := lead_side(record, data, key=self._key, unit=unit):
            return side
        if not is_selected(record, fraction=data.train_fraction, key=self._key, unit=unit):
            return "unused"
        if is_heldout(record, fraction=data.heldout_fraction, key=self._key, unit=unit):
            return "held out"
        if not (name := site):  # the one to which a simulation deals it
            names = self._config.federation.names
            name = names[assign_site(record, data.partition, num_sites=len(names), key=self._key, unit=unit)]
        units = self.units[name]
        units.add(record.fields["user"] if unit == "user" else len(units))
        return "train"

    def _note_tokens(self, records: Sequence[Record], found: _Findings) -> list[int]:
        """The lengths of the examples that a run would make of records, before any are cut."""

        def examples(records: Sequence[Record], length: int) -> TextDataset:
            data = replace(self._data, max_length=length)
            return self.task.tokenise(records, self._tokenizer, data=data, lenient_within=self._within)

        most = self._data.max_length
        whole = examples(records, max(most, _MOST_TOKENS))
        left = _supervised(whole)
        long = [place for place, tokens in enumerate(whole.lengths) if tokens > most]
        fitted = _supervised(examples([records[place] for place in long], most)) if long else []
        for place, count in zip(long, fitted, strict=True):
            if self._data.windows == 1 or count < left[place]:
                found.note(records[place].line, "cut")
            if 0 < count < left[place]:
                found.note(records[place].line, "lost")
            left[place] = count
        for record, count, hides in zip(records, left, self.task.hide_parts(whole, data=self._data), strict=True):
            if not count:
                found.note(record.line, "unlearnt")
            if hides:
                found.note(record.line, "hidden")
        return [int(length) for length in whole.lengths]

    def _note_twins(self, record: Record, use: str, found: _Findings) -> None:
        mark, twins = (use, record.answer), self._earlier.twins(record, use)
        for kind in get_args(Likeness):
            here = [twin for twin in twins[kind] if twin.mark[0] == use]
            if own := next((twin for twin in here if twin.mark == mark), None):
                found.note(record.line, kind, like=own.line)
                break
            if kind == "same" and here:
                found.note(record.line, "contradiction", like=here[0].line)
                break
        for kind, across in _ACROSS.items():
            if other := next((twin for twin in twins[kind] if twin.mark[0] != use), None):
                found.note(record.line, across, other.mark[0], like=other.line)
                break

    def skipped(self) -> Iterator[str]:
        if not duplicates.has_datasketch():
            yield f"near-duplicates: datasketch is not installed ({INSTALL})"
        if self._earlier.is_full:
            yield (
                f"duplicates beyond {duplicates.MOST_SAME:,} different records, near-duplicates beyond "
                f"{duplicates.MOST_ALIKE:,} or {duplicates.MOST_LETTERS:,} letters"
            )


class _Findings(dict[tuple[Kind, str, str], Finding]):
    """Findings in a file so far, by kind, what and column."""

    def note(self, line: int, kind: Kind, what: str = "", column: str = "", *, like: int | None = None) -> None:
        """Note a record by its line, and by that of the earlier one that it is like."""
        one = self.get((kind, what, column)) or Finding(kind=kind, what=what, column=column)
        self[kind, what, column] = replace(one, count=one.count + 1, lines=(*one.lines, (line, like))[:SHOWN])


def _note_shared_texts(record: Record, texts: dict[bytes, tuple[int, int]], found: _Findings) -> None:
    """Note a record of several texts if an earlier one has one of them, too."""
    earlier = []
    for text in {text for _, text in record.texts()}:
        digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()
        line, count = texts.get(digest, (record.line, 0))
        earlier += [line] if count else []
        if count or len(texts) < duplicates.MOST_SAME:
            texts[digest] = line, count + 1
    if earlier:
        found.note(record.line, "shared", like=min(earlier))


def _supervised(examples: TextDataset) -> list[int]:
    """How many targets of each example are learnt."""
    known = (np.nan_to_num(target, nan=UNSUPERVISED) != UNSUPERVISED for target in examples.targets)
    counts = np.array([np.count_nonzero(one) for one in known]).reshape(len(examples), -1).sum(axis=1)
    return [int(count) for count in counts]


def _lengths(lengths: npt.NDArray[np.int64]) -> Lengths:
    """Of sorted numbers of tokens."""
    median, most_of_them = (int(np.quantile(lengths, share, method="inverted_cdf")) for share in (0.5, 0.9))
    shortest, longest = int(lengths[0]), int(lengths[-1])
    step = math.ceil((longest + 1 - shortest) / _BINS)
    starts = range(shortest, longest + 1, step)
    counts, _ = np.histogram(lengths, [*starts, starts[-1] + step])
    bins = tuple((start, start + step - 1, int(count)) for start, count in zip(starts, counts, strict=True))
    return Lengths(median=median, most_of_them=most_of_them, longest=longest, bins=bins)

"""Checks of an experiment's data files for errors and unusual records; the output is for the data's owner only.

Findings contain counts, line numbers and column names, never a record's text, because users may share the output.  The
counts are exact, without noise.  No record is dropped or changed, and no run reads the findings.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from fedtune.config import RunConfig
from fedtune.data.bad_rows import Faults
from fedtune.data.formats import detect_format, iter_raw_rows
from fedtune.data.load import assign_to_lead, derive_split_key
from fedtune.data.partition import assign_site, is_heldout, is_selected
from fedtune.data.records import Record, chunk_records, resolve_file, validate_rows
from fedtune.data.span_formats import count_entity_types, decode_tags
from fedtune.data.spec import SITE, DataSpec
from fedtune.data.tokenization import UNSUPERVISED, TextDataset, Tokenizer
from fedtune.data.values import find_misplaced_spans, split_labels
from fedtune.extras import build_install_command, is_installed
from fedtune.lab.preparation import duplicates
from fedtune.lab.preparation.duplicates import Earlier, Likeness, Twin, normalize_spelling
from fedtune.lab.preparation.patterns import ODD_TEXTS, find_damage, find_identifiers, find_odd_texts
from fedtune.lab.preparation.readers import count_token_ids
from fedtune.spec import DataError
from fedtune.tasks.inputs import get_input_for
from fedtune.version import find_shipped_folders

SHOWN = 20  # maximum number of stored errors per file, and of lines per finding
_MAX_TOKENS = 8_192  # longer examples count as this length
_BINS = 10
_USES = ("train", "held out", "validation", "test", "unused")
Kind = Literal[
    "cut", "lost", "unlearned", "scheme", "hidden", "torn", "overlap", "near_overlap", "contradiction", "same", "alike",
    "shared", "declared", "personal", "damage",
]  # fmt: skip
_Likes: TypeAlias = tuple[tuple[Kind, list[Twin]], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A kind of unusual value or duplicate, with the records in which it occurs."""

    kind: Kind
    what: str  # subtype, such as "e-mail"
    column: str  # empty: the record as a whole
    count: int = 0
    # (line or row number, number of the similar earlier record) of the first records
    lines: tuple[tuple[int, int | None], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Token counts of a file's records, before truncation."""

    median: int
    most_of_them: int  # 90th percentile
    longest: int
    bins: tuple[tuple[int, int, int], ...]  # histogram (minimum tokens, maximum tokens, records)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileCheck:
    """Findings in one file."""

    path: str
    places: str  # unit of line numbers: "lines", or "rows" if rows may share a line
    rows: int  # number of rows
    # number of usable records by use: "train", "held out", "validation", "test" or "unused"
    uses: Mapping[str, int]
    # the first unusable rows: (file, line and field; value; requirement)
    errors: tuple[tuple[str, str, str], ...]
    num_errors: Mapping[str, int]  # number of unusable rows by requirement
    findings: tuple[Finding, ...]
    labels: Mapping[str, int]  # number of records per declared label
    # number of rows per declared label whose undeclared label differs only in case and spaces
    spelt_otherwise: Mapping[str, int]
    lengths: Lengths | None  # None: no usable record


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """Findings in the training, validation and test files, and the names of `skipped` checks."""

    max_length: int
    files: tuple[FileCheck, ...]
    # "declared" size and "true" number of training records (or users) by site
    sizes: Mapping[str, Mapping[str, int]]
    skipped: tuple[str, ...]


def check(config: RunConfig, tokenizer: Tokenizer) -> Checked:
    """Read an experiment's files as a run would, and check every record.

    Args:
        config: the experiment.
        tokenizer: the model's tokenizer.

    Raises:
        DataError: a file is missing or unreadable; errors in single records are findings.
    """
    look = _CheckState(config, tokenizer)
    files = tuple(look.check_file(path, use, site) for path, use, site in _iter_files(config))
    declared = config.declared_sizes().items()
    sizes = {site: {"declared": size, "true": len(look.units[site])} for site, size in declared}
    missing = f"near-duplicates: datasketch is not installed ({build_install_command('data')})"
    skipped = [] if is_installed("datasketch") else [missing]
    if look.earlier.is_full:
        most = f"{duplicates.MAX_ALIKE:,} or {duplicates.MAX_LETTERS:,} letters"
        skipped.append(f"duplicates after {duplicates.MAX_SAME:,} different records, near-duplicates after {most}")
    return Checked(max_length=config.data.max_length, files=files, sizes=sizes, skipped=tuple(skipped))


def _iter_files(config: RunConfig) -> Iterator[tuple[Path, str, str]]:
    """Yield (path, use, site) of all files; the site is empty for partitioned files and for the lead's files."""
    data = config.data
    sites = config.federation.names if data.partition.kind == "file" else ("",)
    files = [("train", data.train_file.replace(SITE, site), site) for site in sites]
    files += [(use, name, "") for use, name in (("validation", data.validation_file), ("test", data.test_file)) if name]
    for use, name, site in files:
        path = resolve_file(name, find_shipped_folders(), key=f"data.{use}_file")
        # Relative to the working folder if possible, because error messages start with the path.
        yield (path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path), use, site


def count_labels(record: Record, data: DataSpec) -> Mapping[str, int]:
    """Count a record's labels, or its entities by type."""
    if "labels" in record.fields:
        return Counter(split_labels(record.fields["labels"], separator=data.label_separator))
    return {record.fields["label"]: 1} if "label" in record.fields else count_entity_types(record.fields, data.labels)


class _CheckState:
    """State of the checks across an experiment's files."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer) -> None:
        self.task, self._config, self._data = config.bound_task, config, config.data
        self.task.check_tokenizer(tokenizer, data=config.data)
        self._tokenizer, self._within = tokenizer, count_token_ids(tokenizer)
        self._fault, self._key = self.task.record_validator(config.data), derive_split_key(config.seed)
        self.earlier = Earlier(alike=is_installed("datasketch"))
        self.units: defaultdict[str, set[object]] = defaultdict(set)  # site -> its training users, or record numbers

    def check_file(self, path: Path, use: str, site: str) -> FileCheck:
        data, unit, form = self._data, self._config.privacy.unit, detect_format(path)
        rows, by_row, faults, errors = 0, form == ".json", Faults(), list[tuple[str, str, str]]()
        self._found: dict[tuple[Kind, str, str], Finding] = {}  # findings in this file by (kind, what, column)
        self._texts: dict[bytes, tuple[int, int]] = {}  # digest of a text -> its first line, and number of records
        uses, spelt_otherwise, labels = Counter[str](), Counter[str](), dict.fromkeys(data.labels, 0)
        spellings = {normalize_spelling(label): label for label in reversed(data.labels)}
        lengths: list[int] = []

        def find_fault(record: Record) -> DataError | None:
            error = self._fault(record)
            if error is not None:  # the label may differ from a declared label only in case and spaces
                unknown = {normalize_spelling(label) for label in count_labels(record, data) if label not in labels}
                spelt_otherwise.update(spellings[one] for one in unknown & spellings.keys())
            elif data.partition.kind == "column" and record.fields.get("site") not in (*data.partition.sites, None):
                error = DataError(record.at("site"), "another site", "must be one of data.partition.sites")
            return error

        def iter_usable() -> Iterator[Record]:
            """Yield the usable records, and count unusable records as errors without their text."""
            nonlocal rows
            columns = self.task.columns(data, partition=use == "train", unit=unit)
            for line, one in validate_rows(path, columns, fault=find_fault):
                rows += 1
                if isinstance(one, Record):
                    yield replace(one, line=rows) if by_row else one
                    continue
                faults.add(one, line)
                if len(errors) < SHOWN:
                    errors.append((f"row {rows} ({one.key})" if by_row else one.key, str(one.value), one.bound))

        for some in chunk_records(iter_usable()):
            lengths += self._check_lengths(some)
            for record in some:
                its_use = self._classify_use(record, site) if use == "train" else use
                uses[its_use] += 1
                for label in count_labels(record, data).keys() & labels.keys():
                    labels[label] += 1
                self._check_record(record, its_use)
        # Damage in all cells, including columns that a run ignores.
        for number, (line, row) in enumerate(iter_raw_rows(path, lenient=True), 1):
            for what, column in find_odd_texts(row, form) if not isinstance(row, DataError) else ():
                self._add_finding(number if by_row else line, "damage", what, column)
        if shared := self._found.get(("shared", "", "")):
            most = max(count for _, count in self._texts.values())
            self._found["shared", "", ""] = replace(shared, what=f"(one is in {most:,})")
        return FileCheck(
            path=str(path),
            places="lines" if form in (".jsonl", ".csv", ".tsv") else "rows",
            rows=rows,
            uses={use: uses[use] for use in _USES if use in uses},
            errors=tuple(errors),
            num_errors=faults.summarize(used=0).reasons,
            findings=tuple(sorted(self._found.values(), key=lambda one: get_args(Kind).index(one.kind))),
            labels=labels,
            spelt_otherwise=dict(spelt_otherwise.most_common()),
            lengths=_summarize_lengths(np.array(lengths)) if lengths and data.max_length > 1 else None,
        )

    def _classify_use(self, record: Record, site: str) -> str:
        """Return the use of a record of a training file; training records are also counted for their site."""
        data, unit = self._data, self._config.privacy.unit
        if side := assign_to_lead(record, data, key=self._key, unit=unit):
            return side
        if not is_selected(record, fraction=data.train_fraction, key=self._key, unit=unit):
            return "unused"
        if is_heldout(record, fraction=data.heldout_fraction, key=self._key, unit=unit):
            return "held out"
        if not (name := site):  # the site to which a simulation assigns the record
            names = self._config.federation.names
            name = names[assign_site(record, data.partition, num_sites=len(names), key=self._key, unit=unit)]
        units = self.units[name]
        units.add(record.fields["user"] if unit == "user" else len(units))
        return "train"

    def _add_finding(self, line: int, kind: Kind, what: str = "", column: str = "", *, like: int | None = None) -> None:
        """Add a record's line to a finding, with the line of a similar earlier record."""
        one = self._found.get((kind, what, column)) or Finding(kind=kind, what=what, column=column)
        lines = (*one.lines, (line, like))[:SHOWN]
        self._found[kind, what, column] = replace(one, count=one.count + 1, lines=lines)

    def _check_lengths(self, records: Sequence[Record]) -> list[int]:
        """Count the tokens of the records' examples before truncation, and add findings for truncated records."""

        def read(records: Sequence[Record], length: int) -> tuple[TextDataset, list[int]]:
            """Tokenize the records; return the examples and the number of trained targets in each."""
            data = replace(self._data, max_length=length)
            examples = self.task.tokenize(records, self._tokenizer, data=data, lenient_within=self._within)
            known = [np.nan_to_num(target, nan=UNSUPERVISED) != UNSUPERVISED for target in examples.targets]
            learned = np.array(list(map(np.count_nonzero, known))).reshape(len(examples), -1).sum(axis=1)
            return examples, learned.tolist()

        most = self._data.max_length
        whole, left = read(records, max(most, _MAX_TOKENS))
        long = [place for place, tokens in enumerate(whole.lengths) if tokens > most]
        fitted = read([records[place] for place in long], most)[1] if long else []
        for place, count in zip(long, fitted, strict=True):
            if self._data.windows == 1 or count < left[place]:
                self._add_finding(records[place].line, "cut")
            if 0 < count < left[place]:
                self._add_finding(records[place].line, "lost")
            left[place] = count
        hidden = self.task.find_ignored_annotations(whole, data=self._data)
        for record, count, hides in zip(records, left, hidden, strict=True):
            if not count:
                self._add_finding(record.line, "unlearned")
            if hides:
                self._add_finding(record.line, "hidden")
        return [int(length) for length in whole.lengths]

    def _check_record(self, record: Record, use: str) -> None:
        """Add findings for unusual values of a record, and for its overlap with earlier records."""
        data, line, twins = self._data, record.line, self.earlier.find_twins(record, use)
        same, alike = ([one for one in twins[kind] if one.use == use] for kind in get_args(Likeness))
        own_same, own_alike = ([one for one in some if one.answer == record.target_key] for some in (same, alike))
        others, near_others = ([one for one in twins[kind] if one.use != use] for kind in get_args(Likeness))
        here: _Likes = (("same", own_same), ("contradiction", same), ("alike", own_alike))
        elsewhere: _Likes = (("overlap", others), ("near_overlap", near_others))
        for likes in (here, elsewhere):  # in each the first that there is
            if found := next(((kind, some[0]) for kind, some in likes if some), None):
                kind, twin = found
                self._add_finding(line, kind, twin.use if likes is elsewhere else "", like=twin.line)
        if decode_tags(record.fields.get("tags", "O").split("\n"), data.labels)[1]:
            self._add_finding(line, "scheme")
        for way in find_misplaced_spans(record.fields):
            self._add_finding(line, "torn", way)
        if self.task.count_texts_per_record(data) > data.windows:
            self._check_shared_texts(record)
        for what, column in get_input_for(data).iter_unusual_values(record, data):
            self._add_finding(line, "declared", what, column)
        odd: dict[tuple[Kind, str, str], None] = {}
        for role, text in record.texts():
            column, damage = data.columns[role], (what for what in find_damage(text) if what not in ODD_TEXTS)
            odd |= dict.fromkeys(("personal", kind, column) for kind, *_ in find_identifiers(text))
            odd |= dict.fromkeys(("damage", what, column) for what in damage)
        for one in odd:
            self._add_finding(line, *one)

    def _check_shared_texts(self, record: Record) -> None:
        """Add a finding if one of a record's several texts occurs in an earlier record."""
        earlier = []
        for text in {text for _, text in record.texts()}:
            digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()
            line, count = self._texts.get(digest, (record.line, 0))
            earlier += [line] if count else []
            if count or len(self._texts) < duplicates.MAX_SAME:
                self._texts[digest] = line, count + 1
        if earlier:
            self._add_finding(record.line, "shared", like=min(earlier))


def _summarize_lengths(lengths: npt.NDArray[np.int64]) -> Lengths:
    median, most_of_them = (int(np.quantile(lengths, share, method="inverted_cdf")) for share in (0.5, 0.9))
    shortest, longest = int(lengths.min()), int(lengths.max())
    step = math.ceil((longest + 1 - shortest) / _BINS)
    counts = enumerate(np.bincount((lengths - shortest) // step).tolist())
    bins = tuple((shortest + place * step, shortest + (place + 1) * step - 1, count) for place, count in counts)
    return Lengths(median=median, most_of_them=most_of_them, longest=longest, bins=bins)

"""What is wrong or odd with the records of an experiment, for the eyes of those who hold them.

What is found are counts, lines and names of columns; no record's text is among it, since a page may be passed around.
The counts are exact, and no noise protects them.  Nothing is dropped or changed, and no run reads any of it.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from fedtune.config import RunConfig
from fedtune.data.faults import Faults, LeftOut
from fedtune.data.formats import format_of, raw_rows
from fedtune.data.load import lead_side, shipped_folders, split_key
from fedtune.data.partition import PartitionSpec, assign_site, is_heldout, is_selected
from fedtune.data.records import Record, chunks, judged, resolve_file
from fedtune.data.spec import SITE
from fedtune.data.tokenise import UNSUPERVISED, TextDataset, Tokenizer
from fedtune.data.values import split_labels
from fedtune.federation.spec import FederationSpec
from fedtune.preparation import alike
from fedtune.preparation.alike import Earlier, Likeness, spelling
from fedtune.preparation.patterns import OddTexts, damage, identifiers
from fedtune.privacy.site_policy import Policy
from fedtune.spec import ConfigError, DataError
from fedtune.tasks import task_named

SHOWN = 20
"""Errors that are kept of a file, and lines of a finding."""
_MOST_TOKENS = 8_192
"""Up to which lengths are told apart."""
_LANGUAGE_RECORDS, _LANGUAGE_LETTERS, _FEW_LETTERS = 100_000, 1_000, 40
"""Records whose language is looked at, letters of each, and letters with which a text is too short to tell."""
_BINS = 10
_USES = ("train", "held out", "validation", "test", "unused")
_BY_LINE = (".jsonl", ".csv", ".tsv")
INSTALL = "pip install 'fedtune[data]'"
Kind = Literal[
    "cut",
    "lost",
    "unlearnt",
    "overlap",
    "near_overlap",
    "contradiction",
    "same",
    "alike",
    "shared",
    "personal",
    "damage",
]
_KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What some records of a file have in common.

    Attributes:
        kind: of finding.
        what: within the kind, such as "e-mail".
        column: where it stands; empty: in the record as a whole.
        count: records.
        lines: of the first of them, or their rows, with that of the earlier record that each is like, if any.
    """

    kind: Kind
    what: str
    column: str
    count: int
    lines: tuple[tuple[int, int | None], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Tokens of the records of a file, before any are cut.

    Attributes:
        median, most_of_them, longest: quantiles 0.5, 0.9 and 1.
        bins: (fewest tokens, most tokens, records) of equal steps from the shortest to the longest.
    """

    median: int
    most_of_them: int
    longest: int
    bins: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class FileCheck:
    """One file.

    Attributes:
        path: the file.
        places: what numbers of places count: "lines", or the "rows" of a file whose rows may share a line.
        rows: in it.
        uses: records that can be used, by what for: "train", "held out" by its site, "validation", "test", or "unused".
        errors: what is wrong with the first rows that cannot be used: (file, line and field; what is there; bound).
        num_errors: all such rows by what a run needs.
        findings: about those that can.
        labels: records of each declared label.
        spelt_otherwise: by declared label, rows whose own is undeclared and differs in case and spaces alone.
        lengths: None: no record can be used.
        languages: records by the code of their language; empty: not looked at.
    """

    path: str
    places: str
    rows: int
    uses: Mapping[str, int]
    errors: tuple[tuple[str, str, str], ...]
    num_errors: Mapping[str, int]
    findings: tuple[Finding, ...]
    labels: Mapping[str, int]
    spelt_otherwise: Mapping[str, int]
    lengths: Lengths | None
    languages: Mapping[str, int]

    @property
    def left_out(self) -> LeftOut:
        """The rows that cannot be used."""
        return LeftOut(rows=self.rows, reasons=self.num_errors)


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteSize:
    """What a site declares, and how many records (or users) it would train on."""

    site: str
    declared: int
    true: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """All that was found.

    Attributes:
        max_length: the most tokens of an example.
        files: in the order of training, validation and test.
        sizes: of the sites.
        skipped: what was not looked at, and why.
    """

    max_length: int
    files: tuple[FileCheck, ...]
    sizes: tuple[SiteSize, ...]
    skipped: tuple[str, ...]


def check(config: RunConfig, tokenizer: Tokenizer, *, within: int) -> Checked:
    """Read the files of an experiment as a run would, and look at each record.

    Args:
        config: the experiment's.
        tokenizer: the base's.
        within: token ids must be below this number.

    Raises:
        DataError: for what is a fault of a file and of no record, such as a missing one.
        ConfigError: the tokenizer cannot be taken.
    """
    look = _Look(config, tokenizer, within)
    files = tuple(look.file(path, use, site) for path, use, site in _files(config))
    return Checked(
        max_length=config.data.max_length,
        files=files,
        sizes=tuple(
            SiteSize(site=site, declared=declared, true=look.size(site))
            for site, declared in config.declared_sizes().items()
        ),
        skipped=tuple(look.skipped()),
    )


def at_own_site(config: RunConfig, policy: Policy, *, folder: Path) -> RunConfig:
    """An experiment over a real site's own file, as its policy has it.

    Args:
        config: the experiment's.
        policy: the site's.
        folder: where the policy lies; its paths start there.

    Raises:
        ConfigError: the policy has no such data set, or the file no column for a role of the experiment.
    """
    dataset = next((one for one in policy.dataset if one.id == config.data.dataset), None)
    if dataset is None:
        known = ", ".join(one.id for one in policy.dataset) or "none"
        raise ConfigError("data.dataset", config.data.dataset, f"must be a data set of the site's policy ({known})")
    data = replace(
        config.data,
        train_file=str(folder / dataset.path),
        columns={role: dataset.columns[role] for role in config.data.columns if role in dataset.columns},
        declared_sizes=dataset.declared_size,
        partition=PartitionSpec(),
        train_fraction=1.0,
        validation_file=None,
        validation_fraction=0.0,
        test_file=None,
        test_fraction=0.0,
    )
    federation = FederationSpec(num_sites=1, min_sites=1, site_names=(policy.site,))
    privacy = replace(config.privacy, unit=policy.population.unit)
    return replace(config, data=data, federation=federation, privacy=privacy)


def _files(config: RunConfig) -> Iterator[tuple[Path, str, str]]:
    """(file, what it is used for, the site whose file it is) of each; no site: it is dealt out, or the lead's."""
    data = config.data
    by_file = data.partition.kind == "file"
    named = [(data.train_file.replace(SITE, site), site) for site in (config.federation.names if by_file else ("",))]
    for name, site in named:
        yield _near(resolve_file(name, shipped_folders(), key="data.train_file")), "train", site
    for use, file in (("validation", data.validation_file), ("test", data.test_file)):
        if file is not None:
            yield _near(resolve_file(file, shipped_folders(), key=f"data.{use}_file")), use, ""


def _near(path: Path) -> Path:
    """The path from the working folder, where it lies in that: it stands before each error."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


_ACROSS: Mapping[Likeness, Kind] = {"same": "overlap", "alike": "near_overlap"}


class _Look:
    """What the files of one experiment share."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, within: int) -> None:
        self.task, self.tokenizer, self._within = task_named(config.task), tokenizer, within
        self.task.check_tokenizer(tokenizer, data=config.data)
        self.config, self._key = config, split_key(config.seed)
        self.fault = self.task.fault(config.data)
        self.earlier = Earlier(alike=alike.is_installed("datasketch"))
        self.tells_languages = alike.is_installed("py3langid")
        self._records: Counter[str] = Counter()
        self._users: defaultdict[str, set[str]] = defaultdict(set)

    def file(self, path: Path, use: str, site: str) -> FileCheck:
        """Look at one file."""
        unit = self.config.privacy.unit
        columns = self.task.columns(self.config.data, partition=use == "train", unit=unit)
        tally = _Tally(self, form=format_of(path))
        for some in chunks(tally.records(path, columns)):
            uses = [self._use(record, site) if use == "train" else use for record in some]
            tally.take(some, uses)
        tally.take_odd_texts(path)
        return tally.result(path)

    def labels(self, record: Record) -> tuple[str, ...]:
        """The labels that a record has, one or several."""
        if "labels" in record.fields:
            return split_labels(record.fields["labels"], separator=self.config.data.label_separator)
        return (record.fields["label"],) if "label" in record.fields else ()

    def _use(self, record: Record, site: str) -> str:
        """What a record of a training file is used for; one that is trained on counts for its site."""
        data, unit = self.config.data, self.config.privacy.unit
        if side := lead_side(record, data, key=self._key, unit=unit):
            return side
        if not is_selected(record, fraction=data.train_fraction, key=self._key, unit=unit):
            return "unused"
        if is_heldout(record, fraction=data.heldout_fraction, key=self._key, unit=unit):
            return "held out"
        if not (name := site):  # the one to which a simulation deals it
            names = self.config.federation.names
            name = names[assign_site(record, data.partition, num_sites=len(names), key=self._key, unit=unit)]
        self._records[name] += 1
        if unit == "user":
            self._users[name].add(record.fields["user"])
        return "train"

    def size(self, site: str) -> int:
        """How many records, or users, a site would train on."""
        return len(self._users[site]) if self.config.privacy.unit == "user" else self._records[site]

    def tokens(self, records: Sequence[Record], *, length: int) -> TextDataset:
        """The examples that a run would make of records, with another bound on their length."""
        data = replace(self.config.data, max_length=length)
        return self.task.tokenise(records, self.tokenizer, data=data, lenient_within=self._within)

    def skipped(self) -> Iterator[str]:
        """What was not looked at."""
        if not alike.is_installed("datasketch"):
            yield f"near-duplicates: datasketch is not installed ({INSTALL})"
        if not self.tells_languages:
            yield f"languages: py3langid is not installed ({INSTALL})"
        if self.earlier.is_full:
            yield (
                f"duplicates beyond {alike.MOST_SAME:,} different records, near-duplicates beyond "
                f"{alike.MOST_ALIKE:,} or {alike.MOST_LETTERS:,} letters"
            )


@dataclass(slots=True)
class _Some:
    """Records in which one thing was found."""

    count: int = 0
    lines: list[tuple[int, int | None]] = field(default_factory=list)


class _Tally:
    """What was found in a file so far."""

    def __init__(self, look: _Look, *, form: str) -> None:
        self._look, self._form = look, form
        self._rows = 0
        self._uses: Counter[str] = Counter()
        self._errors: list[tuple[str, str, str]] = []
        self._faults = Faults()
        self._found: defaultdict[tuple[Kind, str, str], _Some] = defaultdict(_Some)
        self._labels: Counter[str] = Counter(dict.fromkeys(look.config.data.labels, 0))
        self._spellings = {spelling(label): label for label in reversed(look.config.data.labels)}
        self._spelt_otherwise: Counter[str] = Counter()
        self._texts: dict[bytes, tuple[int, int]] = {}  # by digest: the first line, and records that have it
        self._lengths: Counter[int] = Counter()
        self._languages: Counter[str] = Counter()

    def records(self, path: Path, columns: Mapping[str, str]) -> Iterator[Record]:
        """The records that a run can use; the others are errors, which quote nothing of them."""
        data = self._look.config.data
        for line, found in judged(path, columns):
            self._rows += 1
            try:
                if isinstance(found, DataError):
                    raise found
                if (fault := self._look.fault(found)) is not None:
                    self._take_spelling(found)
                    raise fault
                if data.partition.kind == "column" and found.fields.get("site") not in {*data.partition.sites, None}:
                    raise DataError(found.at("site"), "another site", "must be one of data.partition.sites")
            except DataError as error:
                self._faults.add(error, line)
                if len(self._errors) < SHOWN:
                    where = f"row {self._rows} ({error.key})" if self._form == ".json" else error.key
                    self._errors.append((where, str(error.value), error.bound))
            else:
                yield replace(found, line=self._rows) if self._form == ".json" else found

    def _take_spelling(self, record: Record) -> None:
        """Note a record that cannot be used of which a label is a declared one but for case and spaces."""
        labels = [label for label in self._look.labels(record) if label not in self._labels]
        known = {self._spellings[spelling(label)] for label in labels if spelling(label) in self._spellings}
        self._spelt_otherwise.update(known)

    def take(self, records: Sequence[Record], uses: Sequence[str]) -> None:
        """Look at some records."""
        self._uses.update(uses)
        self._take_tokens(records)
        for record, use in zip(records, uses, strict=True):
            self._labels.update(label for label in self._look.labels(record) if label in self._labels)
            self._take_twins(record, use)
            self._take_shared(record)
            found: dict[tuple[Kind, str, str], None] = {}
            for role, text in record.texts():
                found |= dict.fromkeys(("personal", one.kind, role) for one in identifiers(text))
                found |= dict.fromkeys(("damage", what, role) for what in damage(text))
            for kind, what, role in found:
                self._note(record, kind, what, self._look.config.data.columns[role])
            self._take_language(record)

    def _take_tokens(self, records: Sequence[Record]) -> None:
        length = self._look.config.data.max_length
        whole = self._look.tokens(records, length=max(length, _MOST_TOKENS))
        self._lengths.update(whole.lengths.tolist())
        left = _supervised(whole)
        long = [place for place, tokens in enumerate(whole.lengths) if tokens > length]
        fitted = _supervised(self._look.tokens([records[place] for place in long], length=length)) if long else []
        for place, count in zip(long, fitted, strict=True):
            self._note(records[place], "cut")
            if 0 < count < left[place]:
                self._note(records[place], "lost")
            left[place] = count
        for record, count in zip(records, left, strict=True):
            if not count:
                self._note(record, "unlearnt")

    def _take_twins(self, record: Record, use: str) -> None:
        mark = (use, record.answer)
        twins = self._look.earlier.twins(record, use)
        here = {kind: [twin for twin in some if twin.mark[0] == use] for kind, some in twins.items()}
        for kind in ("same", "alike"):
            if own := next((twin for twin in here[kind] if twin.mark == mark), None):
                self._note(record, kind, like=own.line)
                break
            if kind == "same" and here[kind]:
                self._note(record, "contradiction", like=here[kind][0].line)
                break
        for kind, across in _ACROSS.items():
            if other := next((twin for twin in twins[kind] if twin.mark[0] != use), None):
                self._note(record, across, other.mark[0], like=other.line)
                break

    def _take_shared(self, record: Record) -> None:
        """Note a record of several texts if an earlier one has one of them, too."""
        if self._look.task.texts(self._look.config.data) == 1:
            return
        earlier = []
        for text in {text for _, text in record.texts()}:
            digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()
            line, count = self._texts.get(digest, (record.line, 0))
            earlier += [line] if count else []
            if count or len(self._texts) < alike.MOST_SAME:
                self._texts[digest] = line, count + 1
        if earlier:
            self._note(record, "shared", like=min(earlier))

    def _take_language(self, record: Record) -> None:
        if not self._look.tells_languages or sum(self._languages.values()) >= _LANGUAGE_RECORDS:
            return
        import py3langid

        text = " ".join(text for _, text in record.texts())[:_LANGUAGE_LETTERS]
        short = sum(map(str.isalpha, text)) < _FEW_LETTERS
        self._languages["" if short else py3langid.classify(text)[0]] += 1

    def take_odd_texts(self, path: Path) -> None:
        """Look at what the rows say beside what a run reads of them."""
        odd = OddTexts({".csv": ",;", ".tsv": "\t"}.get(self._form, ""))
        for number, (line, row) in enumerate(raw_rows(path, lenient=True), 1):
            if not isinstance(row, DataError):
                odd.note(row, number if self._form == ".json" else line)
        for (what, column), lines in odd.lines.items():
            self._found["damage", what, column] = _Some(len(lines), [(line, None) for line in lines[:SHOWN]])

    def _note(self, record: Record, kind: Kind, what: str = "", column: str = "", *, like: int | None = None) -> None:
        some = self._found[kind, what, column]
        some.count += 1
        if len(some.lines) < SHOWN:
            some.lines.append((record.line, like))

    def result(self, path: Path) -> FileCheck:
        """All that was found."""
        most = f"(one is in {max((count for _, count in self._texts.values()), default=0):,})"
        return FileCheck(
            path=str(path),
            places="lines" if self._form in _BY_LINE else "rows",
            rows=self._rows,
            uses={use: self._uses[use] for use in _USES if self._uses[use]},
            errors=tuple(self._errors),
            num_errors=self._faults.left_out(used=0).reasons,
            findings=tuple(
                Finding(
                    kind=kind,
                    what=what or most * (kind == "shared"),
                    column=column,
                    count=some.count,
                    lines=tuple(some.lines),
                )
                for (kind, what, column), some in sorted(self._found.items(), key=lambda one: _KINDS.index(one[0][0]))
            ),
            labels=dict(self._labels),
            spelt_otherwise=dict(self._spelt_otherwise.most_common()),
            lengths=_lengths(self._lengths),
            languages=dict(self._languages.most_common()),
        )


def _supervised(examples: TextDataset) -> list[int]:
    """How many targets of each example are learnt."""
    known = (np.nan_to_num(target, nan=UNSUPERVISED) != UNSUPERVISED for target in examples.targets)
    counts: list[int] = (
        np.array([np.count_nonzero(one) for one in known]).reshape(len(examples), -1).sum(axis=1).tolist()
    )
    return counts


def _lengths(counts: Counter[int]) -> Lengths | None:
    if not counts:
        return None
    lengths = np.array(sorted(counts))
    times = np.array([counts[length] for length in lengths])
    median, most_of_them = (int(lengths[np.searchsorted(times.cumsum(), share * times.sum())]) for share in (0.5, 0.9))
    longest = int(lengths[-1])
    before = int(lengths[0]) - 1
    step = -(-(longest - before) // _BINS)
    bins = tuple(
        (start + 1, start + step, int(times[(lengths > start) & (lengths <= start + step)].sum()))
        for start in range(before, longest, step)
    )
    return Lengths(median=median, most_of_them=most_of_them, longest=longest, bins=bins)

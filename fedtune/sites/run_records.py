"""Records that the user who starts a run may inspect: the lead's own records and the records of simulated sites.

All files are read before the model is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from fedtune.codec import read_regular_file
from fedtune.config import RunConfig
from fedtune.data import Record
from fedtune.data.bad_rows import NONE_LEFT_OUT, SkippedRows
from fedtune.data.json_lists import to_compact_json
from fedtune.data.load import Partitioned, derive_split_key, partition_training_files, read_lead_records, sample_rows
from fedtune.data.partition import assign_site
from fedtune.data.records import NO_VALUE, iter_records, read_column_values, resolve_file
from fedtune.data.spec import SITE
from fedtune.data.values import normalize_name
from fedtune.evaluation.spec import build_missing_test_records_error
from fedtune.formatting import pluralize
from fedtune.privacy.durable import write_durably
from fedtune.privacy.mechanism import Unit
from fedtune.spec import ConfigError, DataError, expand_home
from fedtune.version import find_shipped_folders

MAX_SHARED = 1 / 20
"""Largest fraction of a private file's texts that a public file may contain.

Public data sets of one field share up to 1.5 %.
"""
WRITTEN = "written.sha256"  # file in the run folder with digests of generated texts


@dataclass(frozen=True, slots=True)
class LeadRecords:
    """Records that the lead may inspect, with the skipped rows of their file."""

    records: list[Record]
    left_out: SkippedRows = NONE_LEFT_OUT

    @classmethod
    def read(
        cls, file: str, config: RunConfig, *, key: str, rows: int | None = None, unit: Unit = "record"
    ) -> LeadRecords:
        """Read the records of a file. With unit "user", each record includes its user.

        Args:
            file: path of the file.
            config: the run's configuration.
            key: setting that names the file, for error messages.
            rows: maximum number of rows; None: all rows.
            unit: the privacy unit.

        Raises:
            DataError: the file cannot be read, or has unusable rows and the settings do not skip them.
        """
        task, data = config.bound_task, config.data
        columns, fault = task.columns(data, unit=unit), task.record_validator(data)
        records, left_out = read_lead_records(
            file, columns=columns, key=key, fault=fault, leave_out=data.skips_bad_records
        )
        return cls(sample_rows(records, rows), left_out)

    @classmethod
    def read_for_scoring(cls, config: RunConfig, file: str | None) -> LeadRecords:
        """Read the records of a file for scoring. None selects the run's own test records.

        Raises:
            ConfigError: no file is given, and the run has no test records.
        """
        if file is not None:
            return cls.read(file, config, key="data")
        if (records := RunRecords(config).test) is None:
            raise build_missing_test_records_error()
        return records


class RunRecords:
    """All records of a run on this machine. Each file is read only once."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def read(self) -> None:
        """Read all files, so that errors in a file are reported before a model is loaded.

        Raises:
            DataError: a file cannot be read or has unusable rows, or a site would have no records.
        """
        _ = self.validation, self.test
        if self._config.runtime.kind != "deployment":
            _ = self.dealt

    @cached_property
    def dealt(self) -> Partitioned:
        """All records of a simulation, partitioned by site."""
        return partition_run_records(self._config)

    @cached_property
    def validation(self) -> LeadRecords | None:
        """The lead's validation records; None without a validation file."""
        data = self._config.data
        if data.validation_fraction:
            return LeadRecords(sample_rows(self.dealt.validation, data.validation_rows))
        return self._read_optional(data.validation_file, rows=data.validation_rows, key="data.validation_file")

    @cached_property
    def test(self) -> LeadRecords | None:
        """The lead's test records; None without test data."""
        data = self._config.data
        if data.test_fraction:
            return LeadRecords(sample_rows(self.dealt.test, data.test_rows))
        return self._read_optional(data.test_file, rows=data.test_rows, key="data.test_file")

    @property
    def runs_folder(self) -> Path:
        """Parent folder of all run folders."""
        return Path(self._config.tracking.output_dir)

    def read_records_by_setting(self) -> dict[str, list[Record]]:
        """Return the run's records on this machine by the setting that names their file.

        Records of real sites are excluded.
        """
        sites = () if self._config.runtime.kind == "deployment" else self.dealt.sites
        read = {"data.train_file": [record for site in sites for record in (*site.training, *site.heldout)]}
        read |= {"data.validation_file": self.validation.records if self.validation else []}
        return read | {"data.test_file": self.test.records if self.test else []}

    def files(self) -> dict[str, str]:
        """Return the files that the run reads on this machine: path -> setting that names the file."""
        config, data = self._config, self._config.data
        names = [] if config.runtime.kind == "deployment" else config.federation.names
        files = dict.fromkeys((data.train_file.replace(SITE, name) for name in names), "data.train_file")
        named = {"data.validation_file": data.validation_file, "data.test_file": data.test_file}
        return files | {file: key for key, file in named.items() if file is not None and file not in files}

    def read_whole_files(self) -> Iterator[tuple[str, list[Record]]]:
        """Yield (setting, records) for each file in `files`, including records that the run does not use."""
        for file, key in self.files().items():
            yield key, LeadRecords.read(file, self._config, key=key).records

    def _read_optional(self, file: str | None, *, rows: int | None, key: str) -> LeadRecords | None:
        return None if file is None else LeadRecords.read(file, self._config, key=key, rows=rows)


def partition_run_records(config: RunConfig) -> Partitioned:
    """Partition the records of a simulation by site."""
    task, unit = config.bound_task, config.privacy.unit
    columns = task.columns(config.data, partition=True, unit=unit)
    fault = task.record_validator(config.data)
    return partition_training_files(
        config.data, columns, config.federation.names, seed=config.seed, unit=unit, fault=fault
    )


def assign_sites(config: RunConfig, records: Sequence[Record]) -> list[str] | None:
    """Assign each test record to a simulated site by the rule that partitioned the training records.

    Returns:
        A site name per record. None if no rule exists, because records are partitioned at random or the test file is
        separate from the sites' files.

    Raises:
        DataError: the file lacks the column that the partition depends on.
    """
    partition, names = config.data.partition, config.federation.names
    match partition.kind:
        case "column":
            values = read_column_values(records, config.data.columns["site"], key="data.columns.site")
            known = {value: names[site] for value, site in partition.sites.items()}
            return [known.get(value, NO_VALUE) for value in values]
        case "dirichlet":
            labels = read_column_values(records, config.data.columns["label"], key="data.columns.label")
            key = derive_split_key(config.seed)
            labeled = (Record({**record.fields, "label": label}) for record, label in zip(records, labels, strict=True))
            place = partial(assign_site, spec=partition, num_sites=len(names), key=key)
            return [names[place(record)] for record in labeled]
        case "file" if config.data.test_fraction:
            own = {name: config.data.train_file.replace(SITE, name) for name in names}
            at = {
                str(resolve_file(one, find_shipped_folders(), key="data.train_file")): name for name, one in own.items()
            }
            sites = [at.get(record.file, NO_VALUE) for record in records]
            return sites if {*sites} & {*names} else None
    return None


def require_disjoint(
    records: Sequence[Record], own: RunRecords, *, key: str, file: str, allow_synthetic: bool = False
) -> None:
    """Check that public records overlap neither with the run's own records nor with texts that a run generated.

    Texts are compared in a normalized form (`normalize_text`), each role of the file with each role that identifies the
    run's records (`list_identifying_roles`): a prompt may be new even if its answer is not.

    Args:
        records: the public records.
        own: records of the run. Real sites' records are elsewhere and are not compared.
        key: setting that names the public file.
        file: path of the public file.
        allow_synthetic: accept synthetic records of a run if the file has its card.

    Raises:
        ConfigError: the public records contain more than `MAX_SHARED` of the texts in one of the run's files (or of
            the texts that the run uses from it), more than `MAX_SHARED` of the public texts occur in the run's files,
            or the public records are synthetic and `allow_synthetic` does not apply.
    """
    files = [*own.read_whole_files()]
    roles = list_identifying_roles(count_texts_by_role(record for _, others in files for record in others))
    counted = [(name, count_texts_by_role(others)) for name, others in (*own.read_records_by_setting().items(), *files)]
    private = [(name, counts[role].keys()) for name, counts in counted for role in roles]
    every = set[str]().union(*(texts for _, texts in private))
    for counts in count_texts_by_role(records).values():
        for name, texts in private:
            shared = len(counts.keys() & texts)
            if shared > MAX_SHARED * len(texts) or (shared and len(counts.keys() & every) > MAX_SHARED * len(counts)):
                bound = f"must not contain records of the run: it shares {pluralize(shared, 'text')} with {name}"
                raise ConfigError(key, file, bound)
    if not (allow_synthetic and has_card(file, key=key)):
        require_no_card(file, key=key)
        require_not_generated(records, own.runs_folder, key=key, file=file)


def count_texts_by_role(records: Iterable[Record]) -> Mapping[str, Counter[str]]:
    """Count normalized texts by role. A record without texts, such as an image, counts as one text."""
    counts = defaultdict[str, Counter[str]](Counter)
    for record in records:
        for role, text in [*record.texts()] or [("", record.full_text)]:
            counts[role][normalize_text(text)] += 1
    return counts


def normalize_text(text: str) -> str:
    """Normalize case, whitespace, Unicode form and invisible characters, so that trivial variants compare equal."""
    return unicodedata.normalize("NFKC", normalize_name(text)).casefold()


def list_identifying_roles(counts: Mapping[str, Counter[str]]) -> list[str]:
    """List the roles that identify records: roles with mostly unique texts, and the role with the most distinct texts.

    Other roles have texts that many records share, such as codes or one-word answers.

    Args:
        counts: role -> count of each normalized text.
    """
    most = max(map(len, counts.values()), default=0)
    return [role for role, texts in counts.items() if len(texts) == most or 2 * len(texts) > texts.total()]


def find_card_path(file: Path, suffix: str) -> Path:
    """Return the path of the card for a file of synthetic records: `.json` for programs, `.md` for people."""
    return file.with_name(f"{file.name}.card{suffix}")


def has_card(file: str, *, key: str) -> bool:
    """Return True if a card of synthetic records is next to a file."""
    path = resolve_file(expand_home(file, key=key), find_shipped_folders(), key=key).resolve()
    return os.path.lexists(find_card_path(path, ".json"))


def require_no_card(file: str, *, key: str, kind: str = "public") -> None:
    """Check that a file has no card of synthetic records, because synthetic records inherit privacy loss.

    Raises:
        ConfigError: the file has a card.
    """
    if has_card(file, key=key):
        card = find_card_path(Path(file), ".json").name
        bound = f"must contain {kind} records: {card} next to it lists the runs that generated this file"
        raise ConfigError(key, file, bound)


def record_generated_texts(run: Path, texts: Iterable[str]) -> None:
    """Store digests of generated texts in the run folder, so that a copy of the texts without a card is recognized.

    Raises:
        ConfigError: the folder is not writable.
    """
    try:
        known = read_regular_file(run / WRITTEN).decode().split() if (run / WRITTEN).exists() else []
        write_durably(run / WRITTEN, "\n".join(sorted({*known, *map(_hash_text, texts)})).encode())
    except OSError as error:
        raise ConfigError("RUN", str(run), f"must be a writable folder ({error.strerror})") from None


def require_not_generated(records: Iterable[Record], folder: Path, *, key: str, file: str) -> None:
    """Check that runs in `folder` generated at most `MAX_SHARED` of the texts in each role.

    Raises:
        ConfigError: the records are synthetic.
    """
    hashes = {role: {_hash_text(text) for text in texts} for role, texts in count_texts_by_role(records).items()}
    for place in sorted(folder.glob(f"*/{WRITTEN}")):
        written = set(read_regular_file(place).decode().split())
        if any(len(role_hashes & written) > MAX_SHARED * len(role_hashes) for role_hashes in hashes.values()):
            bound = (
                f"must contain public records: {place.parent} generated some of them. Put their card next to the file"
            )
            raise ConfigError(key, file, bound)


def _hash_text(text: str) -> str:
    return hashlib.sha256(normalize_text(text).encode()).hexdigest()[:16]


def hash_file(file: Path, *, key: str) -> str:
    """Compute the SHA-256 of a file of records in hex, which identifies the file.

    Args:
        file: path of the file.
        key: setting that names the file, for error messages.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return hashlib.sha256(read_regular_file(file)).hexdigest()
    except OSError as error:
        raise DataError(
            key, str(file), f"must be a single file, because its SHA-256 is recorded ({error.strerror})"
        ) from None


def read_prompts(config: RunConfig, name: str, *, key: str, columns: Mapping[str, str] | None = None) -> list[Record]:
    """Read prompts without answers from a file. In a text file, each line is a prompt.

    Args:
        config: the run's configuration.
        name: path of the file.
        key: option that names the file, for error messages.
        columns: role -> column, if the columns differ from those of the run's own files.

    Raises:
        DataError: the file cannot be read, or has no prompts.
    """
    path, task = resolve_file(expand_home(name, key=key), find_shipped_folders(), key=key), config.bound_task
    if path.suffix.lower() == ".txt":
        records = list(_read_prompt_lines(config, path, key=key))
    else:
        named = {role: (columns or {}).get(role, own) for role, own in task.list_input_columns(config.data).items()}
        records = [_strip_answers(record) for record in iter_records(path, named)]
    if not records:
        raise DataError(key, name, "must contain at least one prompt")
    return records


def _read_prompt_lines(config: RunConfig, path: Path, *, key: str) -> Iterator[Record]:
    try:
        # Only newlines end a line, as in `wc -l`, not form feeds or Unicode separators.
        lines = read_regular_file(path).decode("utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(key, str(path), f"must be a readable file ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(key, str(path), f"must be UTF-8 text: byte {error.start + 1} is invalid") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            fields = config.bound_task.prompt_fields(line.removesuffix("\r"), config.data, at=f"{path}:{number}")
            yield Record(fields, file=str(path), line=number)


def _strip_answers(record: Record) -> Record:
    """Remove the assistant turns at the end of a conversation."""
    if "messages" not in record.fields:
        return record
    turns = json.loads(record.fields["messages"])
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if all(turn["role"] != "user" for turn in turns):
        raise DataError(record.at("messages"), "no user turn", "must have a user turn to answer")
    return Record({"messages": to_compact_json(turns)}, file=record.file, line=record.line)

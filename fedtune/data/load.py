"""Loading of records for simulated sites, for a real site, and for the lead."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedtune.data.bad_rows import NONE_LEFT_OUT, Faults, SkippedRows
from fedtune.data.partition import hash_unit, is_selected, partition_records, split_heldout
from fedtune.data.records import Fault, Record, build_empty_file_error, iter_usable_records, resolve_file
from fedtune.data.spec import SITE, DataSpec
from fedtune.privacy.mechanism import Unit
from fedtune.spec import DataError
from fedtune.version import find_shipped_folders

_ROWS_KEY = b"fedtune rows"  # the same key in all runs, so that scores on a sample use the same rows of a file


def is_far_from_declared(true: int, declared: int) -> bool:
    """Whether a declared size differs from the true size by a factor of 1.5 or more."""
    return not 1 / 1.5 < true / declared < 1.5


def derive_split_key(seed: int) -> bytes:
    """Derive the key for a simulation's partition hashes from its seed.

    A real site has its own secret key, which never leaves the site.
    """
    return hashlib.sha256(f"fedtune split {seed}".encode()).digest()


@dataclass(frozen=True, slots=True)
class SiteRecords:
    """A site's training and held-out records, and its counts of skipped rows, which must not leave the site."""

    training: list[Record]
    heldout: list[Record]
    left_out: SkippedRows = NONE_LEFT_OUT


@dataclass(frozen=True, slots=True)
class Partitioned:
    """Records of a simulation's training files, by site, and the lead's validation and test records."""

    sites: tuple[SiteRecords, ...]  # the records of each site, in the order of the sites
    validation: list[Record]  # the lead's validation records, by `validation_fraction`
    test: list[Record]  # the lead's test records, by `test_fraction`
    left_out: SkippedRows  # skipped rows
    # with unit "user", the number of ids in the files of several sites, each counted as a user at each of these sites
    shared_users: int = 0


def partition_training_files(
    spec: DataSpec,
    columns: Mapping[str, str],
    names: Sequence[str],
    *,
    seed: int,
    unit: Unit = "record",
    fault: Fault = lambda record: None,
) -> Partitioned:
    """Read a simulation's files, and assign each record to the lead or to a site by its hash, or by its user's hash.

    Args:
        spec: the settings of the data.
        columns: role to column, including the role that the partition uses.
        names: the sites' names.
        seed: the seed of the partition.
        unit: "user" keeps all records of a user at one site.
        fault: returns the reason why the task cannot use a record, or None.

    Raises:
        DataError: a file is missing or malformed, a site would get no record, or a user's records would be at two
            sites.
    """
    key = derive_split_key(seed)
    lead: dict[str, list[Record]] = {"validation": [], "test": []}
    of_files, left_out, by_file = list[list[Record]](), NONE_LEFT_OUT, spec.partition.kind == "file"
    for site in names if by_file else names[:1]:
        name, skips = spec.train_file.replace(SITE, site), spec.skips_bad_records
        records, of_file = read_lead_records(name, columns=columns, key="data.train_file", fault=fault, leave_out=skips)
        left_out = left_out.merge_counts(of_file)
        of_files.append([])
        for record in records:
            side = assign_to_lead(record, spec, key=key, unit=unit)
            if side is not None:
                lead[side].append(record)
            elif is_selected(record, fraction=spec.train_fraction, key=key, unit=unit):
                of_files[-1].append(record)
    sites = tuple(of_files)
    if not by_file:
        sites = partition_records(of_files[0], spec.partition, num_sites=len(names), key=key, unit=unit)
    # Number of sites with records of each user.
    users = Counter(user for site in sites for user in {record.fields.get("user") for record in site} if unit == "user")
    split = []
    for number, records in enumerate(sites):
        held = split_heldout(records, fraction=spec.heldout_fraction, key=key, unit=unit)
        if not held[0]:
            bound = f"leaves site {number + 1} of {len(sites)} without a record ({names[number]})"
            raise DataError("data.train_file", spec.train_file, bound)
        split.append(SiteRecords(*held))
    return Partitioned(
        sites=tuple(split),
        validation=lead["validation"],
        test=lead["test"],
        left_out=left_out,
        shared_users=sum(count > 1 for count in users.values()),
    )


def assign_to_lead(record: Record, spec: DataSpec, *, key: bytes, unit: Unit) -> str | None:
    """Assign a record of a simulation's training file to the lead's "validation" or "test" set; None: to a site."""
    if spec.test_fraction and hash_unit(record, purpose="test", key=key, unit=unit) < spec.test_fraction:
        return "test"
    # Relative to the records outside the test set, so that both fractions refer to the whole file.
    share = spec.validation_fraction / (1 - spec.test_fraction)
    if share and hash_unit(record, purpose="validation", key=key, unit=unit) < share:
        return "validation"
    return None


def read_own_records(
    spec: DataSpec, *, columns: Mapping[str, str], fault: Fault, key: bytes, unit: Unit = "record"
) -> SiteRecords:
    """Read a real site's records, and split off the held-out records by a keyed hash of each record or user.

    A record that the run cannot use (a missing value, a `fault`, or with unit "user" not exactly one user) is skipped
    alone, and a file may have no usable record.  If unusable records stopped the run, a lead could choose settings that
    make the site's reply depend on the content of some record.
    """
    faults = Faults()
    records = iter_usable_records(Path(spec.train_file), columns, fault=fault, faults=faults)
    training, heldout = split_heldout(records, fraction=spec.heldout_fraction, key=key, unit=unit)
    return SiteRecords(training, heldout, faults.summarize(used=len(training) + len(heldout)))


def read_lead_records(
    name: str, *, columns: Mapping[str, str], key: str, fault: Fault = lambda record: None, leave_out: bool = False
) -> tuple[list[Record], SkippedRows]:
    """Read the lead's own records from a file, and count the skipped rows.

    Args:
        name: the file.
        columns: role to column.
        key: the setting that contains the file's name, for messages.
        fault: returns the reason why the task cannot use a record, or None.
        leave_out: whether to skip unusable records.

    Raises:
        DataError: no record is usable; or, without `leave_out`, some record is unusable.
    """
    path, faults = resolve_file(name, find_shipped_folders(), key=key), Faults()
    records = list(iter_usable_records(path, columns, fault=fault, faults=faults, lenient=False))
    if not records or not leave_out:
        faults.raise_if_any()
    if not records:
        raise build_empty_file_error(path)
    return records, faults.summarize(used=len(records))


def sample_rows(records: Sequence[Record], rows: int | None) -> list[Record]:
    """Select the `rows` records with the smallest hashes, in their original order; None selects all records."""
    if rows is None or rows >= len(records):
        return list(records)
    hashes = [hash_unit(record, purpose="rows", key=_ROWS_KEY) for record in records]
    return [records[place] for place in sorted(heapq.nsmallest(rows, range(len(records)), key=hashes.__getitem__))]

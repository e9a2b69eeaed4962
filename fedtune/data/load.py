"""From settings to records: the sites' in a simulation, a real site's, and the lead's own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import fedtune
from fedtune.data.partition import is_selected, partition_records, split_heldout
from fedtune.data.records import Record, iter_records, read_records, resolve_file, usable_records
from fedtune.data.spec import DataSpec
from fedtune.privacy.mechanism import Unit
from fedtune.spec import DataError

_PACKAGE = Path(fedtune.__file__).parent


def shipped_folders() -> tuple[Path, ...]:
    """Where `conf/` and `simulations/` lie: inside an installed wheel, else beside the package in a checkout."""
    return tuple(folder for folder in (_PACKAGE / "share", _PACKAGE.parent) if folder.is_dir())


def split_key(seed: int) -> bytes:
    """The key of a simulation's hashes.  A real site has its own, which never leaves it."""
    return hashlib.sha256(f"fedtune split {seed}".encode()).digest()


@dataclass(frozen=True, slots=True)
class SiteRecords:
    """One site's records: those it trains on, and those held out by their own hash or their user's."""

    training: list[Record]
    heldout: list[Record]


def simulated_site_records(
    spec: DataSpec, *, columns: Mapping[str, str], num_sites: int, seed: int, unit: Unit = "record"
) -> tuple[SiteRecords, ...]:
    """Each simulated site's records out of the one training file; with unit "user" no user is parted.

    Args:
        spec: the run's.
        columns: role to column, with what the partition goes by.
        num_sites: that records are dealt out to.
        seed: of the run.
        unit: that is dealt out.

    Raises:
        DataError: the file is missing or malformed, or a site would have no record, or a user would be at two.
    """
    key = split_key(seed)
    path = resolve_file(spec.train_file, shipped_folders(), key="data.train_file")
    rows = iter_records(path, columns)
    chosen = (row for row in rows if is_selected(row, fraction=spec.train_fraction, key=key, unit=unit))
    sites = partition_records(chosen, spec.partition, num_sites=num_sites, key=key, unit=unit)
    split = tuple(
        SiteRecords(*split_heldout(site, fraction=spec.heldout_fraction, key=key, unit=unit)) for site in sites
    )
    for number, records in enumerate(split, 1):
        if not records.training:
            raise DataError("data.train_file", spec.train_file, f"leaves site {number} of {num_sites} without a record")
    return split


def own_records(
    spec: DataSpec, *, columns: Mapping[str, str], usable: Callable[[Record], bool], key: bytes, unit: Unit = "record"
) -> SiteRecords:
    """A real site's records; `key` is its own secret, and decides by each record's (or user's) hash what is held out.

    A record that a run has no use for (no value, or not `usable`, or with unit "user" not exactly one user) is left
    out by itself, and no record at all is fine: what a lead asks for must not make the answer depend on whether some
    record fits it.

    Raises:
        DataError: the file cannot be read or parsed, whatever the run.
    """
    records = filter(usable, usable_records(Path(spec.train_file), columns))
    return SiteRecords(*split_heldout(records, fraction=spec.heldout_fraction, key=key, unit=unit))


def lead_records(name: str, *, columns: Mapping[str, str], rows: int | None, key: str) -> list[Record]:
    """The lead's own records from file `name`, which the setting `key` gave."""
    return read_records(resolve_file(name, shipped_folders(), key=key), columns, rows=rows)

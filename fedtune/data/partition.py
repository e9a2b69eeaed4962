"""Assignment of records to sites and to the held-out set, as a function of each privacy unit alone.

Each decision compares a keyed hash of the unit with fixed bounds.  The unit is a record, or a user with all its
records.  Adding or removing a unit therefore moves no other unit.  The privacy guarantee requires this property, which
shuffled, stratified and balanced splits lack.  Equal records are always assigned together.
"""

from __future__ import annotations

import hmac
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from functools import lru_cache
from itertools import accumulate
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedtune.data.records import Record, record_key
from fedtune.formatting import pluralize
from fedtune.privacy.mechanism import Unit
from fedtune.spec import ConfigError, DataError, check_positive, spec


@spec
class PartitionSpec:
    """Partition of a simulation's records over its sites.

    Attributes:
        kind: "iid" (by hash alone), "dirichlet" (each label has its own shares of the sites), "column" (by the record's
            `site` role), or "file" (each site has its own file: `data.train_file` with the site's name for `{site}`).
        alpha: concentration for "dirichlet"; small values are skewed (0.1: most labels are at a single site), large
            values approach "iid".
        proportions: relative sizes of the sites, for "iid" and "dirichlet"; empty: equal sizes.
        sites: site index of each value of the `site` role, for "column".
    """

    kind: Literal["iid", "dirichlet", "column", "file"] = "iid"
    alpha: float = 1.0
    proportions: tuple[float, ...] = ()
    sites: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_positive("alpha", self.alpha)
        for proportion in self.proportions:
            check_positive("proportions", proportion)
        if (self.kind == "column") != bool(self.sites):
            bound = 'must map each value to a site for kind "column", and be empty for other kinds'
            raise ConfigError("sites", dict(self.sites), bound)
        if self.kind in ("column", "file") and self.proportions:
            raise ConfigError("proportions", self.proportions, f'must be empty for kind "{self.kind}"')

    def check_sites(self, num_sites: int) -> None:
        """Check the settings that depend on the number of sites.

        Raises:
            ConfigError: for a key of this spec.
        """
        if self.proportions and len(self.proportions) != num_sites:
            raise ConfigError("proportions", self.proportions, f"must have one number for each of {num_sites} sites")
        if self.sites and set(self.sites.values()) != set(range(num_sites)):
            bound = f"must give every site from 0 to {num_sites - 1} at least one value, and no other site"
            raise ConfigError("sites", dict(self.sites), bound)


def hash_unit(record: Record, *, purpose: str, key: bytes, unit: Unit = "record") -> float:
    """Hash a record, or its user, to a number in [0, 1): the top 53 bits of HMAC-SHA256 of purpose and unit.

    Different purposes give independent numbers, so one decision reveals nothing about another.
    """
    whole = record if unit == "record" else Record({"user": record.fields["user"]})
    digest = hmac.digest(key, purpose.encode() + b"\0" + record_key(whole), "sha256")
    return (int.from_bytes(digest[:8], "big") >> 11) * 2.0**-53  # 53 bits are exact in float64 and below 1.0


def is_heldout(record: Record, *, fraction: float, key: bytes, unit: Unit = "record") -> bool:
    """Whether the record's unit is held out from training, for an expected `fraction` of all units."""
    return hash_unit(record, purpose="heldout", key=key, unit=unit) < fraction


def is_selected(record: Record, *, fraction: float, key: bytes, unit: Unit = "record") -> bool:
    """Whether a smaller run uses the record's unit, for an expected `fraction` of all units."""
    return hash_unit(record, purpose="selected", key=key, unit=unit) < fraction


def split_heldout(
    records: Iterable[Record], *, fraction: float, key: bytes, unit: Unit = "record"
) -> tuple[list[Record], list[Record]]:
    """Split records into training and held-out records, in the given order."""
    sides: tuple[list[Record], list[Record]] = ([], [])
    for record in records:
        sides[is_heldout(record, fraction=fraction, key=key, unit=unit)].append(record)
    return sides


def partition_records(
    records: Iterable[Record], spec: PartitionSpec, *, num_sites: int, key: bytes, unit: Unit = "record"
) -> tuple[list[Record], ...]:
    """Partition records over the sites, in the given order; a site may get no record.

    Raises:
        DataError: with unit "user", a user's records would be at two sites.
    """
    sites: tuple[list[Record], ...] = tuple([] for _ in range(num_sites))
    site_of, torn = dict[str, int](), dict[str, Record]()
    for record in records:
        site = assign_site(record, spec, num_sites=num_sites, key=key, unit=unit)
        if unit == "user" and site_of.setdefault(record.fields["user"], site) != site:
            torn.setdefault(record.fields["user"], record)
        sites[site].append(record)
    if torn:
        # Each site protects only its own records, so the person's total loss would be the sum over sites.
        first = next(iter(torn.values()))
        bound = (
            "must be the same for all records of a user, because privacy.unit is user; "
            f"{pluralize(len(torn), 'user')} would be split. Use one site per person; if an id means different people "
            "at different sites, use one file per site (data.partition.kind=file)"
        )
        raise DataError(first.at("site"), first.fields["site"], bound)
    return sites


def group_by_user(records: Sequence[Record]) -> list[npt.NDArray[np.int64]]:
    """Group record indices by user, ascending within each user, in the order of the users' first records."""
    places: dict[str, list[int]] = {}
    for place, record in enumerate(records):
        places.setdefault(record.fields["user"], []).append(place)
    return [np.array(indices, dtype=np.int64) for indices in places.values()]


def count_units(records: Sequence[Record], unit: Unit) -> int:
    """Count the privacy units in a site's records: the records, or their users."""
    return len(group_by_user(records)) if unit == "user" else len(records)


def assign_site(record: Record, spec: PartitionSpec, *, num_sites: int, key: bytes, unit: Unit = "record") -> int:
    """Return the site index in [0, num_sites) of a record, or with unit "user" of its user.

    Raises:
        DataError: with kind "column", the record's value is not in `spec.sites`.
    """
    if spec.kind == "column":
        value = record.fields["site"]
        if value not in spec.sites:
            raise DataError(record.at("site"), value, "must be one of the values in data.partition.sites")
        return spec.sites[value]
    proportions = spec.proportions or (1.0,) * num_sites
    if spec.kind == "dirichlet":
        bounds = _draw_dirichlet_bounds(record.fields["label"], alpha=spec.alpha, proportions=proportions, key=key)
    else:
        bounds = _compute_share_bounds(proportions)
    return bisect_right(bounds, hash_unit(record, purpose="site", key=key, unit=unit))


@lru_cache(maxsize=4096)
def _draw_dirichlet_bounds(
    label: str, *, alpha: float, proportions: tuple[float, ...], key: bytes
) -> tuple[float, ...]:
    """Return the upper bounds of the sites' shares of one label, drawn from Dirichlet(alpha x sites x proportions).

    The generator is seeded from key and label, never from the data, so the shares are fixed before any record is read.
    Scaling the concentration keeps each site's expected share at its proportion (Hsu et al. 2019, arXiv 1909.06335,
    with the prior over sites instead of labels).
    """
    seed = hmac.digest(key, b"dirichlet\0" + label.encode(), "sha256")
    prior = np.array(proportions) / sum(proportions)
    shares = np.random.default_rng(int.from_bytes(seed, "big")).dirichlet(alpha * len(prior) * prior)
    return _compute_share_bounds(tuple(shares.tolist()))


@lru_cache(maxsize=64)
def _compute_share_bounds(shares: tuple[float, ...]) -> tuple[float, ...]:
    """Return the upper bounds of the sites' intervals in [0, 1).

    The last bound is omitted, so that rounding cannot exclude a hash.
    """
    total = sum(shares)
    return tuple(end / total for end in accumulate(shares[:-1]))

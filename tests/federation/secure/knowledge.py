"""An adversary's knowledge from a transcript: every seed it can obtain, and every combination of uploads it can unmask.

The adversary consists of the server and its colluders.  It has every message of every site, and the secrets of the
colluders.  It can unmask a combination of uploads if all masks with unknown seeds cancel in the combination.  This is
linear algebra over the true masks, which a test records when they are generated: a mask that is used twice is a single
unknown.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt

from fedtune.federation.secure import party, shares
from fedtune.federation.secure.masks import sum_masks
from fedtune.federation.secure.messages import Upload
from fedtune.federation.secure.packing import reduce_residues, to_signed_integers, unpack_residues

PRIME = 2**61 - 1
"""The prime of the field of combinations; one with small integer coefficients is readable in this field, too."""


@dataclass
class RecordedUpload:
    """An upload of an honest site, with its plain vector for the test."""

    site: str
    upload: Upload
    vector: npt.NDArray[np.int64]
    seeds: dict[str, bytes]


@dataclass
class Knowledge:
    """Knowledge of a server with colluders.

    Attributes:
        sent: all uploads of honest sites.
        revealed: values of shares by place, by session, release, dealer and the site that the mask is shared with.
    """

    threshold: int
    colluders: frozenset[str]
    sites: tuple[str, ...]
    bits: int
    sent: list[RecordedUpload] = field(default_factory=list)
    revealed: dict[tuple[str, int, str, str], dict[int, int]] = field(default_factory=dict)

    def record_answer(self, answer: bytes) -> None:
        fields: dict[str, Any] = json.loads(answer)
        for dealer, by_site in fields["shares"].items():
            for other, value in by_site.items():
                self.learn(fields["session"], fields["release"], dealer, other, {fields["site"]: int(value, 16)})

    def learn(self, session: str, release: int, dealer: str, other: str, values: Mapping[str, int]) -> None:
        known = self.revealed.setdefault((session, release, dealer, other), {})
        known.update({self.sites.index(holder) + 1: value for holder, value in values.items()})

    def seeds(self) -> set[bytes]:
        """Reconstruct every seed from the revealed shares, for each possible degree of the polynomial."""
        recovered = set()
        for (session, release, dealer, other), values in self.revealed.items():
            row = self.sites.index(other)
            published = [
                record.upload.digests[row][0]
                for record in self.sent
                if (record.site, record.upload.session, record.upload.release) == (dealer, session, release)
            ]
            places = sorted(values)
            for degree in range(len(places)):
                seed = shares.combine_shares({place: values[place] for place in places[: degree + 1]})
                if shares.hash_share(seed, session, release, dealer, other, 0) in published and seed < 2**256:
                    recovered.add(seed.to_bytes(32))
        return recovered

    def find_readable_sums(self) -> list[dict[int, int]]:
        """Compute a reduced basis of the combinations of uploads whose masks are all known, as coefficient by
        upload.
        """
        known, rows = self.seeds(), list[dict[str | int, int]]()
        for number, record in enumerate(self.sent):
            unknown = {
                seed.hex(): _mask_sign(record.site, other, seed)
                for other, seed in record.seeds.items()
                if seed not in known and other not in self.colluders
            }
            rows.append({**{mask: sign for mask, sign in unknown.items() if sign}, number: 1})
        return _find_kernel(rows)

    def unmask(self, combination: Mapping[int, int]) -> npt.NDArray[np.int64]:
        """Remove the known masks from a combination of uploads.

        Unknown masks are removed, too; they must cancel, because otherwise the combination would not be readable.
        """
        total: npt.NDArray[np.uint64] = np.zeros(len(self.sent[0].vector), np.uint64)
        for number, coefficient in combination.items():
            record, factor = self.sent[number], np.array(coefficient).astype(np.int64).astype(np.uint64)
            numbers = unpack_residues(record.upload.vector, len(record.vector), self.bits)
            known = self.seeds()
            seeds = {other: seed for other, seed in record.seeds.items() if seed in known or other in self.colluders}
            total += factor * (numbers - sum_masks(record.site, seeds, length=len(record.vector)))
        return to_signed_integers(reduce_residues(total, self.bits), self.bits)


def _mask_sign(site: str, other: str, seed: bytes) -> int:
    """Return the sign (+1, -1 or 0) of a mask in the upload of a site."""
    mask, positive = sum_masks(site, {other: seed}, length=4), sum_masks("a", {"a": seed}, length=4)
    if not mask.any():
        return 0
    return 1 if np.array_equal(mask, positive) else -1


def _find_kernel(rows: list[dict[str | int, int]]) -> list[dict[int, int]]:
    """Compute the reduced kernel: combinations of rows that cancel all text keys, with the coefficients of the others.

    Gaussian elimination over a prime field, with the text keys before the numbers.
    """
    reduced: list[tuple[str | int, dict[str | int, int]]] = []
    for row in rows:
        for pivot, other in reduced:
            row = _subtract_row(row, other, row.get(pivot, 0))
        pivot = next((name for name in row if isinstance(name, str)), None) or min(row)  # type: ignore[type-var]
        row = _subtract_row({}, row, -pow(row[pivot], -1, PRIME))
        reduced = [(key, _subtract_row(other, row, other.get(pivot, 0))) for key, other in reduced]
        reduced.append((pivot, row))
    return [
        {key: (value + PRIME // 2) % PRIME - PRIME // 2 for key, value in row.items() if isinstance(key, int)}
        for pivot, row in reduced
        if isinstance(pivot, int)
    ]


def _subtract_row(row: dict[Any, int], other: dict[Any, int], factor: int) -> dict[Any, int]:
    keys = {**row, **other}
    values = {key: (row.get(key, 0) - factor * other.get(key, 0)) % PRIME for key in keys}
    return {key: value for key, value in values.items() if value}


@contextmanager
def watch_seeds() -> Iterator[list[dict[str, bytes]]]:
    """Record the seeds of all masks that a site adds during the block."""
    recorded: list[dict[str, bytes]] = []

    def record_seeds(site: str, seeds: Mapping[str, bytes], *, length: int) -> npt.NDArray[np.uint64]:
        recorded.append(dict(seeds))
        return sum_masks(site, seeds, length=length)

    with patch.object(party, "sum_masks", record_seeds):
        yield recorded

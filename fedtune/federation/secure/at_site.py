"""A site's secure sums: one party for each run, in this process's memory alone, and what the site demands of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedtune.federation.secure.agreement import Limits, Rejected, Terms, Wrong, bits_needed
from fedtune.federation.secure.party import Keep, Party, Promise
from fedtune.privacy.keys import SigningKey


def kept_in(path: Path) -> Keep:
    """Writes each promise as a line of JSON at the end of this file, and waits until it is on disk."""

    def keep(promise: Promise) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(json.dumps(asdict(promise)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    return keep


_MOST_RUNS = 4
"""Whose parties are kept; a run whose party is gone begins a new session."""


def terms_of(
    *, run: str, proposal: str, members: Mapping[str, str], threshold: int, length: int, largest: int
) -> Terms:
    """The terms of a run's sums, in as few bits as they need; lead and sites make the same."""
    bits = bits_needed(len(members), largest)
    return Terms(
        run=run,
        proposal=proposal,
        members=members,
        threshold=threshold,
        length=length,
        largest=largest,
        bits=bits,
    )


@dataclass
class Parties:
    """By run, with the number of the lead's session; what a restart forgets, and is meant to."""

    of_run: dict[str, tuple[str, Party]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SumsAtSite:
    """What a site answers in the steps of a secure sum.

    Attributes:
        parties: shared by all requests to this process.
        limits: that it holds every run's terms to.
        roster: public identity keys by site, itself included, as this site has them from the sites themselves.
        keep: writes a promise before the answer that makes it.
    """

    site: str
    identity: SigningKey
    parties: Parties
    limits: Limits
    roster: Mapping[str, str]
    keep: Keep

    def announce(self, session: str, members: Sequence[str], terms: Callable[[Mapping[str, str]], Terms]) -> bytes:
        """A key for a run's session of the lead's; asked again for the same one, the same.

        Args:
            session: the lead's name for it.
            members: the run's sites.
            terms: of the run, given the members' keys as this site knows them.

        Raises:
            Rejected: a member is unknown here, or the terms are not within the limits.
        """
        if not set(members) <= set(self.roster):
            raise Rejected(Wrong.ROSTER_DIFFERS)
        agreed = terms({site: self.roster[site] for site in members})
        name, party = self.parties.of_run.get(agreed.run, ("", None))
        if party is None or name != session:
            party = Party(
                self.site, identity=self.identity, terms=agreed, roster=self.roster, limits=self.limits, keep=self.keep
            )
            self.parties.of_run.pop(agreed.run, None)
            self.parties.of_run[agreed.run] = session, party
            while len(self.parties.of_run) > _MOST_RUNS:
                del self.parties.of_run[next(iter(self.parties.of_run))]
        return party.announce()

    def join(self, run: str, announcements: Sequence[bytes]) -> bytes:
        """Take all members' keys; the session's digest."""
        return self.party(run).join(announcements).encode()

    def upload(self, run: str, release: int, vector: npt.NDArray[np.int64]) -> bytes:
        """The site's vector, masked; see `Party.upload`."""
        return self.party(run).upload(release, vector)

    def party(self, run: str) -> Party:
        """The site's part in a run's sums; raises Rejected where it has none."""
        if run not in self.parties.of_run:
            raise Rejected(Wrong.SESSION_DIFFERS)
        return self.parties.of_run[run][1]

"""A site's secure sums: one party for each run, in this process's memory alone, and what the site demands of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedtune.federation.secure.agreement import Demand, Rejected, Terms, Wrong, require_pinned
from fedtune.federation.secure.party import Keep, Party, Promise
from fedtune.privacy.durable import write_durably
from fedtune.privacy.keys import SigningKey

_MOST_NOTED = 64  # sessions whose newest promises are on disk; a site has long lost the keys of older ones


def kept_in(path: Path) -> Keep:
    """Writes each promise in place of the one before it in its session, and waits until it is on disk.

    The file has a line of JSON for each session, the newest last, and is replaced whole: a crash leaves it with the
    earlier promise or with this one, and this one before any answer that makes it.
    """

    def keep(promise: Promise) -> None:
        lines = path.read_bytes().splitlines() if path.exists() else []
        others = [line for line in lines if promise.session.encode() not in line]
        kept = [*others[1 - _MOST_NOTED :], json.dumps(asdict(promise)).encode()]
        write_durably(path, b"".join(line + b"\n" for line in kept))

    return keep


_MOST_RUNS = 16  # whose parties are kept; a run whose parties are gone begins a new session
_MOST_SESSIONS = 3  # of a run: the one that goes on, and others that a lead tries to begin beside it


class Parties:
    """A process's parties, by the digest of a run's proposal and the lead's names of its sessions, the oldest first.

    One session of a run goes on.  One that went on before is kept: a lead that cannot begin another session goes back
    to it.  A restart forgets all of them, and is meant to.
    """

    def __init__(self) -> None:
        self.of_proposal: dict[str, dict[str, Party]] = {}
        self.joined: dict[str, str] = {}  # of a run, the session that goes on

    def find(self, proposal: str, session: str) -> Party | None:
        """Return a session's party; None: there is none."""
        return self.of_proposal.get(proposal, {}).get(session)

    def add(self, proposal: str, session: str, party: Party) -> None:
        """Keep a party, and drop the oldest that do not go on where a run has too many, or there are too many runs."""
        runs = self.of_proposal
        while proposal not in runs and len(runs) >= _MOST_RUNS:
            dropped = next((one for one in runs if one not in self.joined), next(iter(runs)))
            del runs[dropped]
            self.joined.pop(dropped, None)
        parties = runs.setdefault(proposal, {})
        parties[session] = party
        idle = [one for one in parties if one not in (session, self.joined.get(proposal))]
        for one in idle[: max(0, len(parties) - _MOST_SESSIONS)]:
            del parties[one]


@dataclass(frozen=True, kw_only=True)
class SumsAtSite:
    """The answers of a site in the steps of a secure sum."""

    site: str
    identity: SigningKey
    parties: Parties  # shared by all requests to this process
    demand: Demand  # that every run's terms must meet
    # public identity keys by site, itself included, as this site has them from the sites themselves
    roster: Mapping[str, str]
    keep: Keep  # writes a promise before the answer that makes it

    def announce(self, session: str, members: Sequence[str], terms: Callable[[Mapping[str, str]], Terms]) -> bytes:
        """A key for a run's session of the lead's; asked again for the same one, the same.

        Args:
            session: the lead's name for it.
            members: the run's sites.
            terms: of the run, given the members' keys as this site knows them.

        Raises:
            Rejected: a member is unknown here, or the terms are less than the site demands.
        """
        if not set(members) <= set(self.roster):
            raise Rejected(Wrong.ROSTER_DIFFERS)
        agreed = terms({site: self.roster[site] for site in members})
        party = self.parties.find(agreed.proposal, session)
        if party is None:
            party = Party(
                self.site, identity=self.identity, terms=agreed, roster=self.roster, demand=self.demand, keep=self.keep
            )
            self.parties.add(agreed.proposal, session, party)
        return party.announce()

    def join(self, proposal: str, session: str, announcements: Sequence[bytes]) -> bytes:
        """Take all members' keys, and go on in this session; returns its digest.

        Asked for an earlier one again, the site goes back to it.  That is safe: each session has keys, masks, releases
        and promises of its own.
        """
        digest = self._party(proposal, session).join(announcements)
        self.parties.joined[proposal] = session
        return digest.encode()

    def party(self, proposal: str, session: str) -> Party:
        """The site's part in the session that goes on.

        Raises:
            Rejected: that is another one, or the site trusts its members or terms no more.
        """
        if self.parties.joined.get(proposal) != session:
            raise Rejected(Wrong.SESSION_DIFFERS)
        return self._party(proposal, session)

    def _party(self, proposal: str, session: str) -> Party:
        found = self.parties.find(proposal, session)
        if found is None:
            raise Rejected(Wrong.SESSION_DIFFERS)
        require_pinned(found.terms, self.roster)  # the policy may have changed since
        self.demand(found.terms)
        return found

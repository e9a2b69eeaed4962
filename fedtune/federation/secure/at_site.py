"""A site's side of secure aggregation: one party per session, kept only in memory, and the site's own requirements."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedtune.federation.secure.agreement import Demand, Rejected, Terms, Wrong, require_pinned
from fedtune.federation.secure.party import Keep, Party, SumConfirmation
from fedtune.privacy.durable import write_durably
from fedtune.privacy.keys import SigningKey

_MOST_NOTED = 64  # sessions whose newest promises are on disk; a site has long lost the keys of older ones


def make_promise_writer(path: Path) -> Keep:
    """Return a function that writes promises to `path`; each promise replaces the earlier one of its session and is
    flushed to disk.

    The file has one line of JSON per session, the newest last, and is replaced atomically: after a crash it holds
    either the earlier promise or the new one, and it holds the new one before any answer that depends on it leaves the
    site.
    """

    def keep(promise: SumConfirmation) -> None:
        lines = path.read_bytes().splitlines() if path.exists() else []
        others = [line for line in lines if promise.session.encode() not in line]
        kept = [*others[1 - _MOST_NOTED :], json.dumps(asdict(promise)).encode()]
        write_durably(path, b"".join(line + b"\n" for line in kept))

    return keep


_MOST_RUNS = 16  # whose parties are kept; a run whose parties are gone begins a new session
_MOST_SESSIONS = 3  # of a run: the one that goes on, and others that a lead tries to begin beside it


class Parties:
    """The parties of a process, by the digest of a run's proposal and the lead's name for a session, oldest first.

    Each run has one current session.  Its previous session is kept, because a lead that cannot begin a new session
    returns to it.  A restart deletes all parties, on purpose.
    """

    def __init__(self) -> None:
        self.of_proposal: dict[str, dict[str, Party]] = {}
        self.joined: dict[str, str] = {}  # of a run, the session that goes on

    def find(self, proposal: str, session: str) -> Party | None:
        """Return the party of a session; None if there is none."""
        return self.of_proposal.get(proposal, {}).get(session)

    def add(self, proposal: str, session: str, party: Party) -> None:
        """Add a party; drop the oldest idle sessions of a run that has too many, and the oldest run if there are too
        many runs.
        """
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
    """A site's answers to the steps of secure aggregation."""

    site: str
    identity: SigningKey
    parties: Parties  # shared by all requests to this process
    demand: Demand  # that every run's terms must meet
    # public identity keys by site, itself included, as this site has them from the sites themselves
    roster: Mapping[str, str]
    keep: Keep  # writes a promise before the answer that makes it

    def announce(self, session: str, members: Sequence[str], terms: Callable[[Mapping[str, str]], Terms]) -> bytes:
        """Announce this site's key for a session; repeated calls for one session return the same announcement.

        Args:
            session: the lead's name for the session.
            members: the sites in the run.
            terms: builds the terms of the run from the members' public keys, as this site knows them.

        Raises:
            Rejected: the roster lacks a member, or the terms do not meet the site's requirements.
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
        """Accept the keys of all members, make this session the current one, and return its digest.

        A request for an earlier session switches back to it.  That is safe, because each session has its own keys,
        masks, releases and promises.

        Raises:
            Rejected: the session is unknown, a key is not genuine, or the site no longer accepts the members or the
                terms.
        """
        digest = self._find_party(proposal, session).join(announcements)
        self.parties.joined[proposal] = session
        return digest.encode()

    def party(self, proposal: str, session: str) -> Party:
        """Return this site's party in the current session of a run.

        Raises:
            Rejected: `session` is not the current session, or the site no longer accepts its members or terms.
        """
        if self.parties.joined.get(proposal) != session:
            raise Rejected(Wrong.SESSION_DIFFERS)
        return self._find_party(proposal, session)

    def _find_party(self, proposal: str, session: str) -> Party:
        found = self.parties.find(proposal, session)
        if found is None:
            raise Rejected(Wrong.SESSION_DIFFERS)
        require_pinned(found.terms, self.roster)  # the policy may have changed since
        self.demand(found.terms)
        return found

"""A site's side of secure aggregation: one in-memory `Party` per session, and the site's own requirements."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedtune.codec import read_regular_file
from fedtune.federation.secure.agreement import Demand, Rejected, RejectionReason, Terms, require_pinned
from fedtune.federation.secure.party import Keep, Party, SumConfirmation
from fedtune.privacy.durable import write_durably
from fedtune.privacy.keys import SigningKey

_MAX_NOTED = 64  # sessions with a promise on disk; the keys of older sessions no longer exist


def make_promise_writer(path: Path) -> Keep:
    """Create a function that durably stores the newest promise of each session in the file at `path`.

    The file has one line of JSON per session, newest last, and is replaced atomically: after a crash it contains either
    the earlier promise or the new promise.  The new promise is flushed to disk before any answer that depends on it
    leaves the site.
    """

    def keep(promise: SumConfirmation) -> None:
        lines = read_regular_file(path).splitlines() if path.exists() else []
        others = [line for line in lines if promise.session.encode() not in line]
        kept = [*others[1 - _MAX_NOTED :], json.dumps(asdict(promise)).encode()]
        write_durably(path, b"".join(line + b"\n" for line in kept))

    return keep


_MAX_RUNS = 16  # runs with parties in memory; a run without parties begins a new session
_MAX_SESSIONS = 3  # sessions per run: the current session, and further sessions that a lead tries to begin


class Parties:
    """In-memory registry of a process's `Party` objects by proposal digest and session name, oldest first.

    Each run has one current session.  The previous session is retained, because a lead that cannot begin a new session
    returns to it.  Parties are deliberately not stored on disk, so a restart discards them.
    """

    def __init__(self) -> None:
        self.of_proposal: dict[str, dict[str, Party]] = {}
        self.joined: dict[str, str] = {}  # proposal digest -> the current session

    def find(self, proposal: str, session: str) -> Party | None:
        """Return the party of a session; None if there is none."""
        return self.of_proposal.get(proposal, {}).get(session)

    def add(self, proposal: str, session: str, party: Party) -> None:
        """Add a party; if a limit is exceeded, evict the oldest idle sessions of its run, or the oldest run."""
        runs = self.of_proposal
        while proposal not in runs and len(runs) >= _MAX_RUNS:
            dropped = next((run for run in runs if run not in self.joined), next(iter(runs)))
            del runs[dropped]
            self.joined.pop(dropped, None)
        parties = runs.setdefault(proposal, {})
        parties[session] = party
        idle = [other for other in parties if other not in (session, self.joined.get(proposal))]
        for evicted in idle[: max(0, len(parties) - _MAX_SESSIONS)]:
            del parties[evicted]


@dataclass(frozen=True, kw_only=True)
class SiteAggregator:
    """A site's handler for the steps of secure aggregation."""

    site: str
    identity: SigningKey
    parties: Parties  # shared by all requests to this process
    demand: Demand  # the requirements for the terms of every run
    # site -> its public identity key, including this site, obtained from the sites themselves
    roster: Mapping[str, str]
    keep: Keep  # stores a promise before the answer with the promise is sent

    def announce(self, session: str, members: Sequence[str], terms: Callable[[Mapping[str, str]], Terms]) -> bytes:
        """Announce this site's key for a session; idempotent within a session.

        Args:
            session: the lead's name for the session.
            members: the sites in the run.
            terms: builds the terms of the run from the members' public keys in this site's roster.

        Raises:
            Rejected: a member is missing from the roster, or the terms do not meet the site's requirements.
        """
        if not set(members) <= set(self.roster):
            raise Rejected(RejectionReason.ROSTER_DIFFERS)
        agreed = terms({site: self.roster[site] for site in members})
        party = self.parties.find(agreed.proposal, session)
        if party is None:
            party = Party(
                self.site, identity=self.identity, terms=agreed, roster=self.roster, demand=self.demand, keep=self.keep
            )
            self.parties.add(agreed.proposal, session, party)
        return party.announce()

    def join(self, proposal: str, session: str, announcements: Sequence[bytes]) -> bytes:
        """Accept the keys of all members, make this session the current session, and return its digest.

        A request for an earlier session makes that session the current session again.  That is safe, because sessions
        share no keys, masks, releases or promises.

        Raises:
            Rejected: the session is unknown, a key is not genuine, or the site no longer accepts the members or terms.
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
            raise Rejected(RejectionReason.SESSION_DIFFERS)
        return self._find_party(proposal, session)

    def _find_party(self, proposal: str, session: str) -> Party:
        party = self.parties.find(proposal, session)
        if party is None:
            raise Rejected(RejectionReason.SESSION_DIFFERS)
        require_pinned(party.terms, self.roster)  # the policy may have changed since
        self.demand(party.terms)
        return party

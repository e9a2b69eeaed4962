"""A site's secure sums: one party for each run, in this process's memory alone, and what the site demands of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fedtune.federation.secure.agreement import Limits, Rejected, Terms, Wrong, require_pinned
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


@dataclass
class Sessions:
    """A run's parties by the lead's names of their sessions, the oldest first; `joined` is the one that goes on.

    One that was there before is kept: a lead that cannot begin another session goes back to it.
    """

    parties: dict[str, Party] = field(default_factory=dict)
    joined: str = ""

    def add(self, name: str, party: Party) -> None:
        """Keep another one, and drop the oldest that does not go on."""
        self.parties[name] = party
        idle = [one for one in self.parties if one not in (name, self.joined)]
        for one in idle[: max(0, len(self.parties) - _MOST_SESSIONS)]:
            del self.parties[one]


@dataclass
class Parties:
    """By digest of the run's proposal; what a restart forgets, and is meant to."""

    of_proposal: dict[str, Sessions] = field(default_factory=dict)

    def sessions(self, proposal: str) -> Sessions:
        """The run's sessions, made if there are none.

        If there are too many runs, one without a joined session is dropped first.
        """
        if proposal not in self.of_proposal:
            while len(self.of_proposal) >= _MOST_RUNS:
                idle = (one for one, sessions in self.of_proposal.items() if not sessions.joined)
                del self.of_proposal[next(idle, next(iter(self.of_proposal)))]
            self.of_proposal[proposal] = Sessions()
        return self.of_proposal[proposal]


@dataclass(frozen=True, kw_only=True)
class SumsAtSite:
    """The answers of a site in the steps of a secure sum."""

    site: str
    identity: SigningKey
    parties: Parties  # shared by all requests to this process
    limits: Limits  # that it holds every run's terms to
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
            Rejected: a member is unknown here, or the terms are not within the limits.
        """
        if not set(members) <= set(self.roster):
            raise Rejected(Wrong.ROSTER_DIFFERS)
        agreed = terms({site: self.roster[site] for site in members})
        sessions = self.parties.sessions(agreed.proposal)
        if session not in sessions.parties:
            made = Party(
                self.site, identity=self.identity, terms=agreed, roster=self.roster, limits=self.limits, keep=self.keep
            )
            sessions.add(session, made)
        return sessions.parties[session].announce()

    def join(self, proposal: str, session: str, announcements: Sequence[bytes]) -> bytes:
        """Take all members' keys, and go on in this session; returns its digest.

        Asked for an earlier one again, the site goes back to it.  That is safe: each session has keys, masks, releases
        and promises of its own.
        """
        digest = self._party(proposal, session).join(announcements)
        self.parties.sessions(proposal).joined = session
        return digest.encode()

    def party(self, proposal: str, session: str) -> Party:
        """The site's part in the session that goes on.

        Raises:
            Rejected: that is another one, or the site trusts its members or terms no more.
        """
        if self.parties.of_proposal.get(proposal, Sessions()).joined != session:
            raise Rejected(Wrong.SESSION_DIFFERS)
        return self._party(proposal, session)

    def _party(self, proposal: str, session: str) -> Party:
        found = self.parties.of_proposal.get(proposal, Sessions()).parties.get(session)
        if found is None:
            raise Rejected(Wrong.SESSION_DIFFERS)
        require_pinned(found.terms, self.roster)  # the policy may have changed since
        self.limits.require(found.terms)
        return found

"""What a server asks of a site, signed by the lead, and what a site answers."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from fedtune.federation.secure.agreement import Terms, bits_needed
from fedtune.privacy.keys import SigningKey, is_signed
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Answer, Reason, Receipt, Refused, read_release
from fedtune.spec import WIRE_SCHEMA, ConfigError, check_name

INVITATION, ROUND, END, SUM = "invitation", "round request", "end of run", "step of a secure sum"
"""Purposes of a lead's signatures."""
_MOST_CHARACTERS = 1 << 16
"""Of a signed text: what a server asks for is kept in the ledger, and must not fill a site's disk."""
_NO_JSON = (ValueError, TypeError, KeyError, OverflowError, RecursionError)
_MOST_ROUNDS = 1 << 31  # far beyond any plan's, and what every table can hold
_T = TypeVar("_T")
_SHA256, _NONCE = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Signed:
    """A text and a lead's signature on it, as they travel."""

    text: str
    signature: str

    @classmethod
    def by(cls, lead: SigningKey, purpose: str, fields: Mapping[str, Any]) -> Signed:
        """These fields, as a lead signs them for this purpose."""
        text = json.dumps(fields, sort_keys=True)
        return cls(text=text, signature=lead.sign(purpose, text.encode()))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Uncharged:
    """A question about a run that is charged to no round.

    Attributes:
        proposal: of the run.
        site: who is asked.
        expires: seconds since 1970 after which the question is void.
    """

    proposal: Proposal
    site: str
    expires: float

    @property
    def run(self) -> str:
        """The run that is asked about."""
        return self.proposal.run

    @property
    def round(self) -> int:
        """0: none."""
        return 0

    def digest(self) -> str:
        """SHA-256, in hex, of what is asked; when it expires is no part of it."""
        return self.proposal.digest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Invitation(_Uncharged):
    """The lead's question whether a site would take part in a run, before any site is charged for it.

    Attributes:
        less: whether a site whose budget has no room for all of it is to say how much it has room for.
        nonce: 32 random hexadecimal digits, which come back in an offer.
    """

    nonce: str
    less: bool = False

    def signed(self, lead: SigningKey) -> Signed:
        """The question as it is sent."""
        about = {"site": self.site, "expires": self.expires, "less": self.less, "nonce": self.nonce}
        return Signed.by(lead, INVITATION, {"protocol": WIRE_SCHEMA, **about, "proposal": self.proposal.to_json()})

    @classmethod
    def of(cls, signed: Signed) -> Invitation:
        """The question that was signed, by the lead that it names; raises as `_opened` does."""

        def is_right(asked: Invitation) -> bool:
            return type(asked.less) is bool and _NONCE.fullmatch(asked.nonce) is not None

        return _question(cls, signed, INVITATION, is_right)


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundRequest:
    """The server's proposal for one round at one site.

    Attributes:
        proposal: of the run; the same in every round.
        round: from 1.
        adapter_digest: of the adapter that travels with the request.
        receipt: the last one that the lead has of the site, or None; a ledger that lacks it was lost or put back.
        expires: seconds since 1970 after which the request is void.
        session: the lead's name for the session of the secure sum that the round is a release of; else empty.
    """

    proposal: Proposal
    round: int
    site: str
    adapter_digest: str
    receipt: Receipt | None
    expires: float
    session: str = ""

    @property
    def run(self) -> str:
        """The run that the round belongs to."""
        return self.proposal.run

    def signed(self, lead: SigningKey) -> Signed:
        """The request as it is sent."""
        receipt = None if self.receipt is None else asdict(self.receipt)
        fields = {"protocol": WIRE_SCHEMA, **self._asked(), "receipt": receipt, "expires": self.expires}
        return Signed.by(lead, ROUND, fields)

    @classmethod
    def of(cls, signed: Signed) -> RoundRequest:
        """The request that was signed, by the lead that it names; raises as `_opened` does."""

        def read(fields: dict[str, Any]) -> RoundRequest:
            receipt = None if fields["receipt"] is None else read_release(Receipt, fields["receipt"])
            proposal = Proposal.from_json(fields["proposal"])
            request = cls(**{**fields, "proposal": proposal, "receipt": receipt})
            check_name("site", request.site)  # it goes into a site's log
            numbers = type(request.round) is int and _is_moment(request.expires)
            known = _SHA256.fullmatch(request.adapter_digest) is not None
            right = numbers and known and 1 <= request.round < _MOST_ROUNDS
            named = _NONCE.fullmatch(request.session) if proposal.plan.shared else request.session == ""
            if not (right and named):
                raise ValueError("wrong type or out of range")
            return request

        return _opened(signed, ROUND, _in_this_protocol(read), lead=lambda request: request.proposal.lead)

    def _asked(self) -> dict[str, Any]:
        """What is asked for; receipt and expiry are no part of it, and may differ when the lead asks again."""
        fields = {name: getattr(self, name) for name in ("round", "site", "adapter_digest")}
        if self.session:
            fields["session"] = self.session
        return {**fields, "proposal": self.proposal.to_json()}

    def digest(self) -> str:
        """SHA-256, in hex, of what is asked for: two requests with one digest ask for the same thing."""
        return hashlib.sha256(json.dumps(self._asked(), sort_keys=True).encode()).hexdigest()


ANNOUNCE, JOIN, CONFIRM, UNMASK = "announce", "join", "confirm", "unmask"


def terms_of(proposal: Proposal, *, members: Mapping[str, str], length: int) -> Terms:
    """The terms of a run's secure sums, in as few bits as they need; its lead and each of its sites make the same.

    Args:
        proposal: of the run.
        members: site -> public identity key.
        length: values of an adapter.
    """
    sums = proposal.plan.sums
    return Terms(
        run=proposal.run,
        proposal=proposal.digest(),
        members=members,
        threshold=sums.threshold,
        length=length,
        largest=sums.largest_value,
        bits=bits_needed(len(members), sums.largest_value),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SumRequest(_Uncharged):
    """The lead's question for a step of a run's secure sums beside the upload, which is a round's update.

    Attributes:
        step: "announce" a key, "join" the session of all keys, "confirm" survivors, or "unmask" their sum.
        session: 32 random hexadecimal digits, the lead's name for the session that is announced.
        parts_digest: `digest_of_parts` of the messages that travel with the question.  A carrier who changes one cannot
            make a site answer what the lead did not ask.
    """

    step: str
    session: str
    parts_digest: str

    def signed(self, lead: SigningKey) -> Signed:
        """The question as it is sent."""
        about = {name: getattr(self, name) for name in ("site", "expires", "step", "session", "parts_digest")}
        return Signed.by(lead, SUM, {"protocol": WIRE_SCHEMA, **about, "proposal": self.proposal.to_json()})

    @classmethod
    def of(cls, signed: Signed) -> SumRequest:
        """The question that was signed, by the lead that it names; raises as `_opened` does."""

        def is_right(asked: SumRequest) -> bool:
            named = _NONCE.fullmatch(asked.session) and _SHA256.fullmatch(asked.parts_digest)
            return asked.step in (ANNOUNCE, JOIN, CONFIRM, UNMASK) and named is not None

        return _question(cls, signed, SUM, is_right)


def digest_of_parts(parts: Iterable[bytes]) -> str:
    """SHA-256, in hex, of the messages that travel with a `SumRequest`, in their order."""
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class EndOfRun:
    """The lead's word that a run is over, so that a site need not hold budget for it any longer.

    Attributes:
        adapter_digest: of the final adapter that travels with the notice; empty: none does.
    """

    run: str
    lead: str
    adapter_digest: str = ""

    def signed(self, lead: SigningKey) -> Signed:
        """The notice as it is sent."""
        return Signed.by(lead, END, asdict(self))

    @classmethod
    def of(cls, signed: Signed) -> EndOfRun:
        """The notice that was signed, by the lead that it names; raises as `_opened` does."""

        def read(fields: dict[str, Any]) -> EndOfRun:
            notice = cls(**{key: str(fields[key]) for key in ("run", "lead", "adapter_digest")})
            if notice.adapter_digest and not _SHA256.fullmatch(notice.adapter_digest):
                raise ValueError("adapter_digest")
            return notice

        return _opened(signed, END, read, lead=lambda notice: notice.lead)


_Q = TypeVar("_Q", Invitation, SumRequest)


def _question(kind: type[_Q], signed: Signed, purpose: str, is_right: Callable[[_Q], bool]) -> _Q:
    """A question about a run, by the lead that it names; raises as `_opened` does."""

    def read(fields: dict[str, Any]) -> _Q:
        asked = kind(**{**fields, "proposal": Proposal.from_json(fields["proposal"])})
        check_name("site", asked.site)  # it goes into a site's log
        if not (_is_moment(asked.expires) and is_right(asked)):
            raise ValueError("wrong type or out of range")
        return asked

    return _opened(signed, purpose, _in_this_protocol(read), lead=lambda asked: asked.proposal.lead)


def _opened(signed: Signed, purpose: str, read: Callable[[dict[str, Any]], _T], *, lead: Callable[[_T], str]) -> _T:
    """What a lead signed for this purpose, as `read` makes it of the text's fields.

    Raises:
        ConfigError: the text is nothing that is signed for this purpose.
        Refused: the signature is not that of the lead that it names, or it is of another version's protocol.
    """
    try:
        if len(signed.text) > _MOST_CHARACTERS:
            raise ValueError("too long")
        text = signed.text.encode()  # a ValueError for half of a surrogate pair: what is signed are bytes
        asked = read(dict(json.loads(text)))
    except _NO_JSON as error:
        raise ConfigError(purpose, signed.text[:80], f"must be a lead's {purpose}") from error
    if not is_signed(lead(asked), purpose, text, signed.signature):
        raise Refused(Reason.WRONG_SIGNATURE)
    return asked


def _in_this_protocol(read: Callable[[dict[str, Any]], _T]) -> Callable[[dict[str, Any]], _T]:
    """`read`, for what says that it is of this version's protocol."""

    def checked(fields: dict[str, Any]) -> _T:
        spoken = fields.pop("protocol")
        if type(spoken) is not int or not 0 < spoken < _MOST_ROUNDS:
            raise ValueError("protocol")
        if spoken != WIRE_SCHEMA:
            here = f"protocol {WIRE_SCHEMA}: lead and site run different versions of fedtune"
            raise Refused(Reason.MALFORMED_REQUEST, asked=f"protocol {spoken}", allowed=here)
        return read(fields)

    return checked


def _is_moment(value: object) -> bool:
    return type(value) is float and math.isfinite(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """A site's answer: what it releases, and a receipt of what its ledger has charged so far.

    Attributes:
        receipt: None where the site cannot read its ledger, or tells a stranger nothing of it.
    """

    body: Answer
    receipt: Receipt | None

    def is_signed(self) -> bool:
        """Whether the receipt is signed, and was given with exactly this answer, to the bit.

        So nobody who carries an answer, not even the federation's server, can change it.
        """
        try:
            return self.receipt is not None and self.receipt.reply == digest_of(self.body) and self.receipt.is_signed()
        except Exception:  # arrays of texts, for instance: numpy alone raises five kinds
            return False

    @property
    def about(self) -> tuple[str, str, int]:
        """Site, run and round (0: before the run) that the answer says it is about; its own word if `is_signed`."""
        return self.body.site, self.body.run, self.body.round


def digest_of(body: Answer) -> str:
    """SHA-256, in hex, of an answer's canonical bytes; of an update it is what the site's ledger has noted, too."""
    return hashlib.sha256(body.to_bytes()).hexdigest()

"""The words between server and site: questions, signed by the lead, and a site's answers."""

from __future__ import annotations

import hashlib
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Self

from fedtune.codec import decode, parse_json
from fedtune.federation.secure.agreement import Terms
from fedtune.privacy.keys import SigningKey, is_signed
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Answer, Reason, Receipt, Refused
from fedtune.spec import WIRE_SCHEMA, ConfigError, check_name
from fedtune.version import build

_MOST_CHARACTERS = 1 << 16
"""Of a signed text: what a server asks for is kept in the ledger, and must not fill a site's disk."""
_MOST_ROUNDS = 1 << 31  # far beyond any plan's, and what every table can hold
_SHA256, _NONCE = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{32}")
_SOFTWARE = re.compile(r"[\w.+-]{1,80}", re.ASCII)
OTHER_PROTOCOL = re.compile(r"protocol \d{1,10} \(fedtune [\w.+-]{1,80}\): upgrade the (site|lead)", re.ASCII)
"""What a site says it speaks where it refuses another protocol; without a signature, so that no other text is shown."""


def upgrade_needed(*, site: int, lead: int) -> str:
    """Say who must be upgraded for a site and a lead to understand each other; empty where both speak one protocol.

    The protocol's number alone decides: versions and builds of one number go on with each other's runs.
    """
    return "" if site == lead else f"upgrade the {'site' if site < lead else 'lead'}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Signed:
    """A text and a lead's signature on it, as they travel."""

    text: str
    signature: str


class _Word(ABC):
    """Something that a lead says, under a signature for its purpose."""

    __slots__ = ()
    purpose: ClassVar[str]

    @property
    @abstractmethod
    def speaker(self) -> str:
        """The public key of the lead whose word it is."""

    @abstractmethod
    def _to_json(self) -> dict[str, Any]:
        """The fields as they are signed."""

    @classmethod
    @abstractmethod
    def _from_json(cls, fields: dict[str, Any]) -> Self:
        """The inverse; raises ConfigError for anything else."""

    def signed(self, lead: SigningKey) -> Signed:
        """The words as they are sent."""
        text = json.dumps(self._to_json(), sort_keys=True)
        return Signed(text=text, signature=lead.sign(self.purpose, text.encode()))

    @classmethod
    def of(cls, signed: Signed) -> Self:
        """The word that was signed, by the lead that it names.

        Raises:
            ConfigError: the text is nothing that is signed for this purpose.
            Refused: the signature is not that of the lead that it names, or it is of another version's protocol.
        """
        try:
            _require("text", len(signed.text) <= _MOST_CHARACTERS)
            text = signed.text.encode()  # a ValueError for half of a surrogate pair: what is signed are bytes
            said = cls._from_json(parse_json(text, key="text", bound="must be an object"))
        except ValueError as error:
            raise ConfigError(cls.purpose, signed.text[:80], f"must be a lead's {cls.purpose}") from error
        if not is_signed(said.speaker, cls.purpose, text, signed.signature):
            raise Refused(Reason.WRONG_SIGNATURE)
        return said


@dataclass(frozen=True, kw_only=True, slots=True)
class _Question(_Word):
    """A question about a run."""

    proposal: Proposal  # of the run
    site: str  # who is asked
    expires: float  # seconds since 1970 after which the question is void
    software: str = field(default_factory=build)  # the lead's fedtune, version and build; nothing depends on it

    @property
    def run(self) -> str:
        """The run that is asked about."""
        return self.proposal.run

    @property
    def speaker(self) -> str:
        return self.proposal.lead

    def digest(self) -> str:
        """SHA-256, in hex, of what is asked; when it expires is no part of it."""
        return self.proposal.digest()

    def _to_json(self) -> dict[str, Any]:
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return own | {"protocol": WIRE_SCHEMA, "proposal": self.proposal.to_json()}

    @classmethod
    def _from_json(cls, fields: dict[str, Any]) -> Self:
        # Whatever else a later protocol changes, these two fields and the form of a refusal stay as they are.
        spoken, software = fields.pop("protocol", None), fields.setdefault("software", "unknown")
        _require("protocol", type(spoken) is int and 0 < spoken < _MOST_ROUNDS)
        _require("software", type(software) is str and _SOFTWARE.fullmatch(software))
        if needed := upgrade_needed(site=WIRE_SCHEMA, lead=spoken):
            here = f"protocol {WIRE_SCHEMA} (fedtune {build()}): {needed}"
            raise Refused(Reason.MALFORMED_REQUEST, asked=f"protocol {spoken} (fedtune {software})", allowed=here)
        asked = decode(cls, fields)
        check_name("site", asked.site)  # it goes into a site's log
        _require("expires", math.isfinite(asked.expires))
        asked._check()
        return asked

    @abstractmethod
    def _check(self) -> None:
        """Require fields in range; raises ConfigError."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Invitation(_Question):
    """The lead's question whether a site would take part in a run, before any site is charged for it."""

    purpose: ClassVar[str] = "invitation"
    round: ClassVar[int] = 0  # it is charged to none
    nonce: str  # 32 random hexadecimal digits, which come back in an offer
    less: bool = False  # whether a site whose budget has no room for all of it is to say how much it has room for

    def _check(self) -> None:
        _require("nonce", _NONCE.fullmatch(self.nonce))


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundRequest(_Question):
    """The server's proposal for one round at one site."""

    purpose: ClassVar[str] = "round request"
    round: int  # from 1
    adapter_digest: str  # of the adapter that travels with the request
    # the last one that the lead has of the site, or None; a ledger that lacks it was lost or put back
    receipt: Receipt | None
    session: str = ""  # the lead's name for the session of the secure sum that the round is a release of; else empty

    def _to_json(self) -> dict[str, Any]:
        return _Question._to_json(self) | {"receipt": self.receipt and self.receipt.to_json()}

    def _check(self) -> None:
        _require("round", 1 <= self.round < _MOST_ROUNDS)
        _require("adapter_digest", _SHA256.fullmatch(self.adapter_digest))
        secure = self.proposal.plan.shared is not None
        _require("session", _NONCE.fullmatch(self.session) if secure else self.session == "")

    def digest(self) -> str:
        """SHA-256, in hex, of what is asked for: two requests with one digest ask for the same thing.

        Receipt, expiry and the lead's version are no part of it, and may differ when the lead asks again.
        """
        asked = self._to_json() | dict.fromkeys(("protocol", "receipt", "expires"))
        del asked["software"]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


ANNOUNCE, JOIN, CONFIRM, UNMASK = "announce", "join", "confirm", "unmask"


def terms_of(proposal: Proposal, *, members: Mapping[str, str], length: int) -> Terms:
    """The terms of a run's secure sums; its lead and each of its sites make the same.

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
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SumRequest(_Question):
    """The lead's question for a step of a run's secure sums beside the upload, which is a round's update."""

    purpose: ClassVar[str] = "step of a secure sum"
    round: ClassVar[int] = 0  # it is charged to none
    step: str  # "announce" a key, "join" the session of all keys, "confirm" survivors, or "unmask" their sum
    session: str  # 32 random hexadecimal digits, the lead's name for the session that is announced
    # `digest_of_parts` of the messages that travel with the question.  A carrier who changes one cannot make a
    # site answer what the lead did not ask.
    parts_digest: str

    def _check(self) -> None:
        _require("step", self.step in (ANNOUNCE, JOIN, CONFIRM, UNMASK))
        _require("session", _NONCE.fullmatch(self.session))
        _require("parts_digest", _SHA256.fullmatch(self.parts_digest))


def digest_of_parts(parts: Iterable[bytes]) -> str:
    """SHA-256, in hex, of the messages that travel with a `SumRequest`, in their order."""
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class EndOfRun(_Word):
    """The lead's word that a run is over, so that a site need not hold budget for it any longer."""

    purpose: ClassVar[str] = "end of run"
    run: str
    lead: str
    adapter_digest: str = ""  # of the final adapter that travels with the notice; empty: none does

    @property
    def speaker(self) -> str:
        return self.lead

    def _to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def _from_json(cls, fields: dict[str, Any]) -> Self:
        notice = decode(cls, fields)
        _require("adapter_digest", _SHA256.fullmatch(notice.adapter_digest) or not notice.adapter_digest)
        return notice


def _require(key: str, right: object) -> None:
    if not right:
        raise ConfigError(key, "something else", "must be of the right type and in range")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """A site's answer: what it releases, and a receipt of what its ledger has charged so far."""

    body: Answer
    receipt: Receipt | None  # None where the site cannot read its ledger, or tells a stranger nothing of it

    def is_signed(self) -> bool:
        """The receipt is signed, and was given with exactly this answer, to the bit.

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

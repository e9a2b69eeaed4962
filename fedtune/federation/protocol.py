"""The messages between lead and site: questions signed by the lead, and the answers of a site."""

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


def explain_upgrade(*, site: int, lead: int) -> str:
    """Say which side must be upgraded before a site and a lead can communicate; empty if both use the same protocol
    version.

    Only the protocol version matters: different versions and builds of fedtune with the same protocol version can
    continue each other's runs.
    """
    return "" if site == lead else f"upgrade the {'site' if site < lead else 'lead'}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Signed:
    """A message text with a lead's signature, in the form in which both are sent."""

    text: str
    signature: str


class _Word(ABC):
    """A message from a lead that is signed for a single purpose."""

    __slots__ = ()
    purpose: ClassVar[str]

    @property
    @abstractmethod
    def signer_key(self) -> str:
        """The public key of the lead that signed the message."""

    @abstractmethod
    def _to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object, in the form that is signed."""

    @classmethod
    @abstractmethod
    def _from_json(cls, fields: dict[str, Any]) -> Self:
        """Build the message from the object that `_to_json` returns; raises ConfigError for anything else."""

    def sign_with(self, lead: SigningKey) -> Signed:
        """Return the message as it is sent, with the lead's signature."""
        text = json.dumps(self._to_json(), sort_keys=True)
        return Signed(text=text, signature=lead.sign(self.purpose, text.encode()))

    @classmethod
    def from_signed(cls, signed: Signed) -> Self:
        """Read a signed message and verify the signature of the lead that it names.

        Raises:
            ConfigError: the text is not a message of this kind.
            Refused: the signature is not from the lead that the message names, or the message uses another protocol
                version.
        """
        try:
            _require("text", len(signed.text) <= _MOST_CHARACTERS)
            text = signed.text.encode()  # a ValueError for half of a surrogate pair: what is signed are bytes
            said = cls._from_json(parse_json(text, key="text", bound="must be an object"))
        except ValueError as error:
            raise ConfigError(cls.purpose, signed.text[:80], f"must be a lead's {cls.purpose}") from error
        if not is_signed(said.signer_key, cls.purpose, text, signed.signature):
            raise Refused(Reason.WRONG_SIGNATURE)
        return said


@dataclass(frozen=True, kw_only=True, slots=True)
class _Question(_Word):
    """A question from the lead about a run."""

    proposal: Proposal  # of the run
    site: str  # who is asked
    expires: float  # seconds since 1970 after which the question is void
    software: str = field(default_factory=build)  # the lead's fedtune, version and build; nothing depends on it

    @property
    def run(self) -> str:
        """The name of the run that the question is about."""
        return self.proposal.run

    @property
    def signer_key(self) -> str:
        return self.proposal.lead

    def digest(self) -> str:
        """Return the SHA-256, in hex, of the proposal; the expiry is not included."""
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
        if needed := explain_upgrade(site=WIRE_SCHEMA, lead=spoken):
            here = f"protocol {WIRE_SCHEMA} (fedtune {build()}): {needed}"
            raise Refused(Reason.MALFORMED_REQUEST, asked=f"protocol {spoken} (fedtune {software})", allowed=here)
        asked = decode(cls, fields)
        check_name("site", asked.site)  # it goes into a site's log
        _require("expires", math.isfinite(asked.expires))
        asked._check()
        return asked

    @abstractmethod
    def _check(self) -> None:
        """Check that all fields are within their limits; raises ConfigError."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Invitation(_Question):
    """The lead's question whether a site would take part in a run, asked before any site is charged."""

    purpose: ClassVar[str] = "invitation"
    round: ClassVar[int] = 0  # it is charged to none
    nonce: str  # 32 random hexadecimal digits, which come back in an offer
    less: bool = False  # whether a site whose budget has no room for all of it is to say how much it has room for

    def _check(self) -> None:
        _require("nonce", _NONCE.fullmatch(self.nonce))


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundRequest(_Question):
    """The lead's request to one site for one round of training."""

    purpose: ClassVar[str] = "round request"
    round: int  # from 1
    adapter_digest: str  # of the adapter that travels with the request
    # the last one that the lead has of the site, or None; a ledger that lacks it was lost or put back
    receipt: Receipt | None
    session: str = (
        ""  # the lead's name for the session of secure aggregation that the round is a release of; else empty
    )

    def _to_json(self) -> dict[str, Any]:
        return _Question._to_json(self) | {"receipt": self.receipt and self.receipt.to_json()}

    def _check(self) -> None:
        _require("round", 1 <= self.round < _MOST_ROUNDS)
        _require("adapter_digest", _SHA256.fullmatch(self.adapter_digest))
        secure = self.proposal.plan.shared is not None
        _require("session", _NONCE.fullmatch(self.session) if secure else self.session == "")

    def digest(self) -> str:
        """Return the SHA-256, in hex, of the request's content: two requests with equal digests ask for the same round.

        The receipt, the expiry and the lead's software version are not included, and may differ when the lead asks
        again.
        """
        asked = self._to_json() | dict.fromkeys(("protocol", "receipt", "expires"))
        del asked["software"]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


ANNOUNCE, JOIN, CONFIRM, UNMASK = "announce", "join", "confirm", "unmask"


def derive_terms(proposal: Proposal, *, members: Mapping[str, str], length: int) -> Terms:
    """Build the terms of a run's secure aggregation; the lead and every site derive identical terms.

    Args:
        proposal: the proposal of the run.
        members: site -> its public identity key.
        length: the number of values in an adapter.
    """
    sums = proposal.plan.secure_noise
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
    """The lead's request for a step of secure aggregation, other than the upload, which is the update of a round."""

    purpose: ClassVar[str] = "step of secure aggregation"
    round: ClassVar[int] = 0  # it is charged to none
    step: str  # "announce" a key, "join" the session of all keys, "confirm" survivors, or "unmask" their sum
    session: str  # 32 random hexadecimal digits, the lead's name for the session that is announced
    # `hash_parts` of the messages that travel with the question.  A carrier who changes one cannot make a
    # site answer what the lead did not ask.
    parts_digest: str

    def _check(self) -> None:
        _require("step", self.step in (ANNOUNCE, JOIN, CONFIRM, UNMASK))
        _require("session", _NONCE.fullmatch(self.session))
        _require("parts_digest", _SHA256.fullmatch(self.parts_digest))


def hash_parts(parts: Iterable[bytes]) -> str:
    """Return the SHA-256, in hex, of the messages sent with a `SumRequest`, in their order."""
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class EndOfRun(_Word):
    """The lead's notice that a run is over, so that a site can release the budget it reserved for the run."""

    purpose: ClassVar[str] = "end of run"
    run: str
    lead: str
    adapter_digest: str = ""  # of the final adapter that travels with the notice; empty: none does

    @property
    def signer_key(self) -> str:
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
        raise ConfigError(key, "a value of another type or range", "must have the declared type and be in range")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """A site's answer: its release or refusal, and a receipt of what its ledger has charged so far."""

    body: Answer
    receipt: Receipt | None  # None where the site cannot read its ledger, or tells a stranger nothing of it

    def is_signed(self) -> bool:
        """Return True if the receipt is signed and covers exactly this answer, bit for bit.

        Nobody who relays an answer, the federation's server included, can therefore change it.
        """
        try:
            return (
                self.receipt is not None
                and self.receipt.reply == answer_digest(self.body)
                and self.receipt.has_valid_signature()
            )
        except Exception:  # arrays of texts, for instance: numpy alone raises five kinds
            return False

    @property
    def about(self) -> tuple[str, str, int]:
        """The site, run and round (0: before the run) named in the answer; authentic only if `is_signed`."""
        return self.body.site, self.body.run, self.body.round


def answer_digest(body: Answer) -> str:
    """Return the SHA-256, in hex, of an answer's canonical bytes; for an update, the site's ledger records the same
    digest.
    """
    return hashlib.sha256(body.to_bytes()).hexdigest()

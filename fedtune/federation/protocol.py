"""Messages between lead and site: signed requests from the lead, and the replies of a site with their receipts."""

from __future__ import annotations

import hashlib
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Self

from fedtune.codec import decode, hash_json, parse_json
from fedtune.federation.secure.agreement import Terms
from fedtune.privacy.keys import SigningKey, is_signed
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Answer, Reason, Receipt, Refused
from fedtune.spec import WIRE_SCHEMA, ConfigError, check_name
from fedtune.version import build

_MAX_CHARACTERS = 1 << 16
"""Limit on a signed text: the ledger stores requests, and a server must not fill a site's disk."""
_MAX_ROUNDS = 1 << 31  # far above any plan
_SHA256, _NONCE = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{32}")
_SOFTWARE = re.compile(r"[\w.+-]{1,80}", re.ASCII)
OTHER_PROTOCOL = re.compile(r"protocol \d{1,10} \(fedtune [\w.+-]{1,80}\): upgrade the (site|lead)", re.ASCII)
"""Pattern of the text in a refusal from a site with another protocol version.  The refusal is unsigned, so the lead
prints its text only if it matches this pattern."""


def explain_upgrade(*, site: int, lead: int) -> str:
    """Return the advice to upgrade the side with the older protocol version; empty if both versions are equal.

    Versions and builds of fedtune with the same protocol version are compatible, even within one run.
    """
    return "" if site == lead else f"upgrade the {'site' if site < lead else 'lead'}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Signed:
    """Serialized message with the lead's signature."""

    text: str
    signature: str


class _LeadMessage(ABC):
    """Base class of the lead's signed messages; the signature is valid only for the purpose of the message type."""

    __slots__ = ()
    purpose: ClassVar[str]

    @property
    @abstractmethod
    def signer_key(self) -> str:
        """The public key of the lead that signed the message."""

    @abstractmethod
    def _to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object, the content that the signature covers."""

    @classmethod
    @abstractmethod
    def _from_json(cls, fields: dict[str, Any]) -> Self:
        """Build the message from the output of `_to_json`; raise ConfigError for any other object."""

    def sign_with(self, lead: SigningKey) -> Signed:
        """Serialize the message and sign it with the lead's key."""
        text = json.dumps(self._to_json(), sort_keys=True)
        return Signed(text=text, signature=lead.sign(self.purpose, text.encode()))

    @classmethod
    def from_signed(cls, signed: Signed) -> Self:
        """Parse a signed message and verify the signature of the lead that it names.

        Raises:
            ConfigError: the text is not a message of this type.
            Refused: the signature is not from the lead that the message names, or the message has another protocol
                version.
        """
        try:
            _require("text", len(signed.text) <= _MAX_CHARACTERS)
            text = signed.text.encode()  # raises ValueError for an unpaired surrogate
            message = cls._from_json(parse_json(text, key="text", bound="must be an object"))
        except ValueError as error:
            raise ConfigError(cls.purpose, signed.text[:80], f"must be a lead's {cls.purpose}") from error
        if not is_signed(message.signer_key, cls.purpose, text, signed.signature):
            raise Refused(Reason.WRONG_SIGNATURE)
        return message


@dataclass(frozen=True, kw_only=True, slots=True)
class _RunMessage(_LeadMessage):
    """Base class of the lead's messages to one site about a proposed run."""

    proposal: Proposal  # the proposal of the run
    site: str  # the name of the receiving site
    expires: float  # Unix time, in seconds, after which the message is void
    software: str = field(default_factory=build)  # version and build of fedtune at the lead, for information only

    @property
    def run(self) -> str:
        """The name of the run."""
        return self.proposal.run

    @property
    def signer_key(self) -> str:
        return self.proposal.lead

    def digest(self) -> str:
        """Return the SHA-256 of the proposal, in hex, without the expiry of the message."""
        return self.proposal.digest()

    def _to_json(self) -> dict[str, Any]:
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        return content | {"protocol": WIRE_SCHEMA, "proposal": self.proposal.to_json()}

    @classmethod
    def _from_json(cls, fields: dict[str, Any]) -> Self:
        # These two fields and the format of a refusal are identical in every protocol version.
        version, software = fields.pop("protocol", None), fields.setdefault("software", "unknown")
        _require("protocol", type(version) is int and 0 < version < _MAX_ROUNDS)
        _require("software", type(software) is str and _SOFTWARE.fullmatch(software))
        if needed := explain_upgrade(site=WIRE_SCHEMA, lead=version):
            here = f"protocol {WIRE_SCHEMA} (fedtune {build()}): {needed}"
            raise Refused(Reason.MALFORMED_REQUEST, requested=f"protocol {version} (fedtune {software})", allowed=here)
        message = decode(cls, fields)
        check_name("site", message.site)  # it goes into a site's log
        _require("expires", math.isfinite(message.expires))
        message._check()
        return message

    @abstractmethod
    def _check(self) -> None:
        """Check that all fields are within their limits; raise ConfigError otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Invitation(_RunMessage):
    """The lead's invitation of a site to a run, sent before any site is charged."""

    purpose: ClassVar[str] = "invitation"
    round: ClassVar[int] = 0  # no round is charged
    nonce: str  # 32 random hex digits, repeated in the offer
    less: bool = False  # whether a site may offer fewer rounds or more noise if its budget cannot cover the whole plan

    def _check(self) -> None:
        _require("nonce", _NONCE.fullmatch(self.nonce))


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundRequest(_RunMessage):
    """The lead's request to one site for one round of training."""

    purpose: ClassVar[str] = "round request"
    round: int  # from 1
    adapter_digest: str  # SHA-256 of the adapter that is sent with the request
    # the site's last receipt at the lead, or None; a ledger without it was lost or restored from a backup
    receipt: Receipt | None
    session: str = ""  # the lead's name for the secure aggregation session; empty for plain aggregation

    def _to_json(self) -> dict[str, Any]:
        return _RunMessage._to_json(self) | {"receipt": self.receipt and self.receipt.to_json()}

    def _check(self) -> None:
        _require("round", 1 <= self.round < _MAX_ROUNDS)
        _require("adapter_digest", _SHA256.fullmatch(self.adapter_digest))
        secure = self.proposal.plan.shared is not None
        _require("session", _NONCE.fullmatch(self.session) if secure else self.session == "")

    def digest(self) -> str:
        """Return the SHA-256 of the request's content, in hex; requests with equal digests are idempotent repeats of
        one round.

        The receipt, the expiry and the lead's software version are excluded, because they may change in a repeat.
        """
        content = self._to_json() | dict.fromkeys(("protocol", "receipt", "expires"))
        del content["software"]
        return hash_json(content)


ANNOUNCE, JOIN, CONFIRM, UNMASK = "announce", "join", "confirm", "unmask"


def derive_terms(proposal: Proposal, *, members: Mapping[str, str], length: int) -> Terms:
    """Derive the terms of a run's secure aggregation; the lead and every site derive identical terms.

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
class SumRequest(_RunMessage):
    """The lead's request for a step of secure aggregation other than the upload, which is part of a round's update."""

    purpose: ClassVar[str] = "step of secure aggregation"
    round: ClassVar[int] = 0  # no round is charged
    step: str  # "announce" a key, "join" the session of all keys, "confirm" survivors, or "unmask" their sum
    session: str  # 32 random hex digits, the lead's name for the session
    # `hash_parts` of the attached messages, so that a relay cannot change them
    parts_digest: str

    def _check(self) -> None:
        _require("step", self.step in (ANNOUNCE, JOIN, CONFIRM, UNMASK))
        _require("session", _NONCE.fullmatch(self.session))
        _require("parts_digest", _SHA256.fullmatch(self.parts_digest))


def hash_parts(parts: Iterable[bytes]) -> str:
    """Return the SHA-256, in hex, of the messages attached to a `SumRequest`, in order."""
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class EndOfRun(_LeadMessage):
    """The lead's notice that a run has ended; the site then releases the run's unused reservation."""

    purpose: ClassVar[str] = "end of run"
    run: str
    lead: str
    adapter_digest: str = ""  # SHA-256 of the final adapter sent with the notice; empty: no adapter is sent

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
        raise ConfigError(key, "an invalid value", "must have the field's type and be within its range")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """A site's answer to a message, with a receipt of the charges in its ledger so far."""

    body: Answer
    receipt: Receipt | None  # None if the ledger is unreadable or the sender is not an allowed lead

    def is_signed(self) -> bool:
        """Return True if the receipt has a valid signature over exactly this answer.

        The signature prevents relays, including the federation's server, from changing an answer.
        """
        try:
            return (
                self.receipt is not None
                and self.receipt.reply == compute_answer_digest(self.body)
                and self.receipt.has_valid_signature()
            )
        except Exception:  # malformed arrays, for example; numpy alone raises five types of exceptions
            return False

    @property
    def about(self) -> tuple[str, str, int]:
        """The site, run and round that the answer names (round 0: invitation); authentic only if `is_signed()`."""
        return self.body.site, self.body.run, self.body.round


def compute_answer_digest(body: Answer) -> str:
    """Return the SHA-256 of an answer's canonical bytes, in hex; the ledger records the same digest for an update."""
    return hashlib.sha256(body.to_bytes()).hexdigest()

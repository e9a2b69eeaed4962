"""Types of all data that leave a site, apart from the site's name: updates, refusals, receipts and offers.

Each field is either noised (an update's tensors and scores) or computed from the request, the plan, the ledger's own
events and fedtune's own files. No field holds an exact count, loss, gradient norm, file name or exception text.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from fedtune.codec import decode, decode_value
from fedtune.privacy.keys import is_signed
from fedtune.spec import ConfigError, RefusedError, check_at_least

RECEIPT = "receipt"  # purpose of a receipt's signature

_MAGIC = b"fedtune-update-2\n"
_MAX_COUNT, _MAX_TEXT = 1 << 62, 1000


class Reason(StrEnum):
    """Reason of a refusal. The set is closed, so that no free text leaves a site."""

    # Rules of the site's policy, by the names they have in site.toml.
    LEADS = "leads"
    DATASET = "dataset"
    DECLARED_SIZE = "declared_size"
    TASKS = "tasks"
    BASE_MODELS = "base_models"
    TARGET_MODULES = "target_modules"
    MAX_RANK = "max_rank"
    TRAIN_HEAD = "train_head"
    SEEDED_NOISE = "seeded_noise"
    UPDATES = "updates"
    METRICS = "metrics"
    UNIT = "unit"
    DELTA = "delta"
    COHORTS = "cohorts"
    MIN_NOISE_MULTIPLIER = "min_noise_multiplier"
    MAX_SAMPLING_RATE = "max_sampling_rate"
    MIN_GRAD_NORM = "min_grad_norm"
    MAX_GRAD_NORM = "max_grad_norm"
    MAX_LOCAL_STEPS = "max_local_steps"
    MAX_ROUNDS = "max_rounds"
    MAX_RECORDS_PER_USER = "max_records_per_user"
    MAX_ADAPTER_VALUE = "max_adapter_value"
    ADAPTERS = "adapters"
    ALGORITHMS = "algorithms"
    DTYPES = "dtypes"
    MAX_LORA_SCALE = "max_lora_scale"
    MAX_HEAD_SCALE = "max_head_scale"
    MAX_EPSILON = "max_epsilon"
    MAX_EPSILON_PER_RUN = "max_epsilon_per_run"
    MAX_EPSILON_PER_PERIOD = "max_epsilon_per_period"
    SECURE_AGGREGATION = "secure_aggregation"
    MIN_SITES = "min_sites"
    MIN_THRESHOLD = "min_threshold"
    COLLUDERS = "colluders"
    MAX_EPSILON_IF_ALL_COLLUDE = "max_epsilon_if_all_collude"
    # The state of the run in the ledger.
    FROZEN = "frozen"
    PLAN_CHANGED = "plan_changed"
    PLAN_EXHAUSTED = "plan_exhausted"
    RUN_ENDED = "run_ended"
    ROUND_REQUESTED_DIFFERENTLY = "round_requested_differently"
    REPLY_NO_LONGER_STORED = "reply_no_longer_stored"
    LEDGER_BEHIND_RECEIPT = "ledger_behind_receipt"
    BASE_MODEL_MISSING = "base_model_missing"
    SETTINGS = "settings"
    # A decision by a person at the site, made or pending.
    AWAITING_APPROVAL = "awaiting_approval"
    DENIED = "denied"
    PAUSED = "paused"
    # The request itself.
    WRONG_SITE = "wrong_site"
    WRONG_RUN = "wrong_run"
    WRONG_SIGNATURE = "wrong_signature"
    REQUEST_EXPIRED = "request_expired"
    ADAPTER_DIFFERS = "adapter_differs"
    ADAPTER_SHAPE = "adapter_shape"
    MALFORMED_REQUEST = "malformed_request"
    SITE_ERROR = "site_error"
    # A step of secure aggregation; `requested` has the protocol's own reason.
    SECURE_STEP = "secure_step"

    @property
    def is_final(self) -> bool:
        """Whether the site refuses the run permanently, so that a retry is pointless."""
        return self not in _ABOUT_ONE_REQUEST

    @property
    def is_from_stranger(self) -> bool:
        """Whether the sender failed to prove that it is an allowed lead."""
        return self in _OF_A_STRANGER

    @property
    def concerns_budget(self) -> bool:
        """Whether a proposal with fewer rounds, more noise or a lower rank at this site might be accepted."""
        return self in _ABOUT_BUDGET

    @property
    def is_waiting(self) -> bool:
        """Whether a retry may succeed after a person at the site has decided."""
        return self in _WAITING


_ABOUT_BUDGET = {
    Reason.MAX_EPSILON_IF_ALL_COLLUDE,
    Reason.MIN_NOISE_MULTIPLIER,
    Reason.MAX_ROUNDS,
    Reason.MAX_RANK,
    Reason.MAX_EPSILON,
    Reason.MAX_EPSILON_PER_RUN,
    Reason.MAX_EPSILON_PER_PERIOD,
}
_WAITING = {Reason.AWAITING_APPROVAL, Reason.PAUSED}
_OF_A_STRANGER = {Reason.LEADS, Reason.WRONG_SIGNATURE, Reason.MALFORMED_REQUEST}
_ABOUT_ONE_REQUEST = {
    *_WAITING,
    Reason.BASE_MODEL_MISSING,
    Reason.SETTINGS,
    Reason.ROUND_REQUESTED_DIFFERENTLY,
    Reason.REPLY_NO_LONGER_STORED,
    Reason.LEDGER_BEHIND_RECEIPT,
    Reason.WRONG_SITE,
    Reason.WRONG_RUN,
    Reason.WRONG_SIGNATURE,
    Reason.REQUEST_EXPIRED,
    Reason.ADAPTER_DIFFERS,
    Reason.ADAPTER_SHAPE,
    Reason.MAX_ADAPTER_VALUE,
    Reason.MALFORMED_REQUEST,
    Reason.SITE_ERROR,
    Reason.SECURE_STEP,
}


Masked = (
    bytes  # a site's upload to secure aggregation, as its protocol writes it (`fedtune.federation.secure.messages`)
)
Tensors = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Difference:
    """An adapter update in bfloat16: the difference to the adapter before training.

    Attributes:
        halves: tensor name -> upper 16 bits of each float32 value.
    """

    halves: Mapping[str, npt.NDArray[np.uint16]]


MAX_HEADER_BYTES = 1 << 20  # of an update or adapter: its names and shapes become objects of many times that size
_MASKED, _BFLOAT16 = "masked", "bfloat16"
"""Markers in an update's header: "masked" replaces the tensor shapes, and {"bfloat16": shapes} announces a difference.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """A site's noised adapter after a round, optionally with noised scores of the adapter before the round.

    Attributes:
        tensors: the new adapter, the difference to the previous adapter, or the masked vector for secure aggregation.
        scores: noised mean score and noised count of the held-out units (`mechanism.release_scores`); None if the plan
            releases no scores.

    Guarantee: post-processing of the round's `DpEvent`, at the cost that the ledger reserved for the round. Rounding to
    bfloat16 is post-processing too: it comes after the noise, and depends only on values that the lead has. For a
    masked vector the guarantee applies to secure aggregation over as many sites as the plan requires; the vector alone
    reveals nothing (`fedtune.federation.secure`).
    """

    site: str
    run: str
    round: int
    tensors: Tensors | Difference | Masked
    scores: tuple[float, float] | None = None
    _bytes: bytes = field(default=b"", init=False, repr=False, compare=False)

    def to_bytes(self) -> bytes:
        """Encode the update canonically: magic, header length, JSON header, then the tensors or the masked vector.

        Numbers are little-endian. The result is cached, so that receipt, ledger and message contain identical bytes.
        """
        if not self._bytes:
            header, following = self._encode_parts()
            object.__setattr__(self, "_bytes", b"".join([_MAGIC, struct.pack("<Q", len(header)), header, *following]))
        return self._bytes

    def _encode_parts(self) -> tuple[bytes, list[memoryview]]:
        """Return the encoded JSON header and the buffers of the tensors."""
        shapes: Any
        match self.tensors:
            case Masked(data):
                shapes, following = _MASKED, [memoryview(data)]
            case Difference(halves):
                shapes = {_BFLOAT16: [[name, list(value.shape)] for name, value in halves.items()]}
                following = [np.ascontiguousarray(value, dtype="<u2").data for value in halves.values()]
            case tensors:
                shapes = [[name, list(value.shape)] for name, value in tensors.items()]
                following = [np.ascontiguousarray(value, dtype="<f4").data for value in tensors.values()]
        fields = {"site": self.site, "run": self.run, "round": self.round, "tensors": shapes, "scores": self.scores}
        return json.dumps(fields).encode(), following

    @classmethod
    def from_bytes(cls, data: bytes) -> Update:
        """Decode the output of `to_bytes`.

        Raises:
            ConfigError: the bytes are not the canonical encoding of an update.
        """
        start = len(_MAGIC) + 8
        try:
            (size,) = struct.unpack("<Q", data[len(_MAGIC) : start])
            if not data.startswith(_MAGIC) or size > MAX_HEADER_BYTES:
                raise ValueError("wrong magic bytes or header size")
            header = json.loads(data[start : start + size])
            update = cls(
                site=str(header["site"]),
                run=str(header["run"]),
                round=int(header["round"]),
                tensors=_decode_tensors(header["tensors"], memoryview(data)[start + size :]),
                scores=decode_value("scores", header["scores"], tuple[float, float] | None),
            )
            # The encoding is unique, so that no extra field, type or whitespace can smuggle data out.
            finite = all(map(math.isfinite, update.scores or ()))
            if not finite or update._encode_parts()[0] != data[start : start + size]:
                raise ValueError("header")
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError, struct.error) as error:
            raise ConfigError("update", f"{len(data)} bytes", "must be an encoded update") from error
        object.__setattr__(update, "_bytes", data)
        return update


def _decode_tensors(shapes: Any, data: memoryview) -> Tensors | Difference | Masked:
    """Decode the tensors after an update's header.

    Raises:
        ValueError, TypeError or KeyError: the data does not match the header.
    """
    if shapes == _MASKED:
        return Masked(bytes(data))
    rounded = isinstance(shapes, dict)
    shapes, kind = (shapes[_BFLOAT16], np.dtype("<u2")) if rounded else (shapes, np.dtype("<f4"))
    offset, tensors = 0, {}
    for name, shape in shapes:
        if not all(isinstance(length, int) and length >= 0 for length in shape):
            raise ValueError("shape")
        count = math.prod(shape)
        tensors[str(name)] = np.frombuffer(data, dtype=kind, count=count, offset=offset).reshape(shape)
        offset += kind.itemsize * count
    if offset != len(data) or len(tensors) != len(shapes):
        raise ValueError("length")
    return Difference(tensors) if rounded else tensors


class _Plain:
    """Base class of releases without tensors. People read the text fields, so each must be one printable line."""

    __slots__ = ()
    _magic: ClassVar[bytes]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return dict(asdict(self))  # type: ignore[call-overload]

    def to_bytes(self) -> bytes:
        """Encode the answer canonically. The accompanying receipt contains and signs the digest of these bytes."""
        return self._magic + json.dumps(self.to_json(), sort_keys=True).encode()

    @classmethod
    def from_json(cls, fields: object) -> Self:
        """Decode a release from JSON.

        Raises:
            ConfigError: a field is missing or unknown, or has the wrong type or range.
        """
        release = decode(cls, fields)
        for name, value in asdict(release).items():  # type: ignore[call-overload]
            if isinstance(value, str):
                right = len(value) <= _MAX_TEXT and value.isprintable()
            else:
                right = value is None or 0 <= value < _MAX_COUNT
            if not right:
                raise ConfigError(name, value, "must be one printable line, or a number in range")
        return release


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt(_Plain):
    """A site's signed statement of a run's charges in its ledger, from which the lead derives the site's epsilon.

    `sequence` counts all events of the ledger, so a lead can notice charges of other runs.

    Attributes:
        charged_rounds: number of reserved rounds, with or without a reply.
        ended: whether the ledger will never charge the run again, regardless of further requests.
        plan: digest of the accepted plan; empty for a run that the ledger never accepted.
        seeded_noise: whether the run takes its noise from a seed.
        simulated: whether the site belongs to a simulation.
        sequence: number of the newest lasting event (charge or note) in the ledger.
        head: hash of the newest lasting event with a secret salt, which prevents guesses about the ledger's content.
            The lead returns the receipt with its next request; a ledger that does not contain the event was rolled
            back.
        site_key: public key of the site.
        signature: signature by `site_key` on all other fields.
        reply: SHA-256, in hex, of the canonical bytes of the accompanying answer. In the answer to the notice that the
            run has ended: the digest (`Adapter.digest`) of the final adapter in the ledger, or empty if the lead sent
            none. No answer's bytes have the form that this digest hashes, so neither can pass for the other.
    """

    site: str
    run: str
    charged_rounds: int
    sequence: int
    head: str
    site_key: str
    signature: str
    ended: bool
    plan: str
    seeded_noise: bool
    simulated: bool
    reply: str = ""

    def encode_signed_bytes(self) -> bytes:
        """Encode all fields except the signature, for signing and verification."""
        fields = self.to_json()
        del fields["signature"]
        return json.dumps(fields, sort_keys=True).encode()

    def has_valid_signature(self) -> bool:
        """Whether `site_key` signed the receipt."""
        return is_signed(self.site_key, RECEIPT, self.encode_signed_bytes(), self.signature)


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal(_Plain):
    """A site's refusal of a request.

    `requested` and `allowed` contain values of the request, the policy and the ledger only.
    """

    site: str
    run: str
    round: int
    reason: Reason
    requested: str | None = None
    allowed: str | None = None

    _magic: ClassVar[bytes] = b"fedtune-refusal-1\n"

    @property
    def as_text(self) -> str:
        """The reason, with the requested and the allowed value where available."""
        return ", ".join(filter(None, (self.reason.value, format_requested_and_allowed(self.requested, self.allowed))))


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer(_Plain):
    """The maximum rounds and the minimum noise with which a site would accept a proposed run now.

    Attributes:
        max_rounds: maximum number of rounds with the proposal's noise; 0 if the site would accept no round.
        min_noise: smallest noise multiplier with the proposal's rounds; None if no noise multiplier suffices.
        rank: largest rank that the site trains, up to the proposal's rank for it; None if the ranks do not differ.
        nonce: nonce of the invitation, so that an old offer cannot answer a new invitation.
        software: version and build of fedtune at the site.
    """

    site: str
    run: str
    max_rounds: int
    min_noise: float | None
    rank: int | None = None
    nonce: str = ""
    software: str = ""
    round: ClassVar[int] = 0  # an offer comes before the first round
    _magic: ClassVar[bytes] = b"fedtune-offer-1\n"

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_at_least("rank", self.rank, 1)


Answer = Update | Refusal | Offer  # a site's answer; its receipt is signed over `to_bytes`


class Refused(RefusedError):
    """Raised for a request that a site answers with a refusal."""

    def __init__(self, reason: Reason, *, requested: object = None, allowed: object = None) -> None:
        self.reason = reason
        self.requested = None if requested is None else str(requested)[:_MAX_TEXT]
        self.allowed = None if allowed is None else str(allowed)[:_MAX_TEXT]
        comparison = format_requested_and_allowed(self.requested, self.allowed)
        super().__init__(f"{reason}: {comparison}" if comparison else reason.value)

    def to_json(self) -> dict[str, Any]:
        """Return the rule, the requested value and the allowed value as a JSON object."""
        return {"rule": self.reason.value, "requested": self.requested, "allowed": self.allowed}


def format_requested_and_allowed(requested: str | None, allowed: str | None) -> str:
    """Format the requested and the allowed value of a refusal. The text is empty if both values are None."""
    values = {"requested": requested, "allowed": allowed}
    return ", ".join(f"{word} {value}" for word, value in values.items() if value is not None)

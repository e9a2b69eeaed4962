"""Everything that may leave a site, and nothing else: an update, a refusal, a receipt.

Each field is either noised (the update's tensors) or computed from the request, the plan and the ledger's own
entries.  No exact count, loss, gradient norm, file name or exception text has a place here.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from fedtune.spec import ConfigError, RefusedError

Tensors = Mapping[str, npt.NDArray[np.float32]]

_MAGIC = b"fedtune-update-1\n"
_MOST_HEADER_BYTES = 1 << 24


class Reason(StrEnum):
    """Why a reply is not an update.  The list is closed: no text of the site's own leaves with it."""

    PLAN_CHANGED = "plan_changed"
    PLAN_EXHAUSTED = "plan_exhausted"
    ROUND_REQUESTED_DIFFERENTLY = "round_requested_differently"
    REPLY_NO_LONGER_STORED = "reply_no_longer_stored"
    WRONG_SITE = "wrong_site"
    WRONG_RUN = "wrong_run"
    ADAPTER_DIFFERS = "adapter_differs"
    ADAPTER_OUT_OF_RANGE = "adapter_out_of_range"
    LEDGER_BEHIND_RECEIPT = "ledger_behind_receipt"
    MALFORMED_REQUEST = "malformed_request"
    SITE_ERROR = "site_error"


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """The adapter after a site's noisy steps.

    Guarantee: post-processing of the round's `DpEvent`; releasing it costs what the ledger reserved for the round.
    """

    site: str
    run: str
    round: int
    tensors: Tensors

    def to_bytes(self) -> bytes:
        """Canonical bytes: magic, header length, JSON header, then each tensor as little-endian float32."""
        header = self._header()
        body = b"".join(np.ascontiguousarray(value, dtype="<f4").tobytes() for value in self.tensors.values())
        return _MAGIC + struct.pack("<Q", len(header)) + header + body

    def _header(self) -> bytes:
        shapes = [[name, list(value.shape)] for name, value in self.tensors.items()]
        fields = {"site": self.site, "run": self.run, "round": self.round, "tensors": shapes}
        return json.dumps(fields).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Update:
        """The update that `to_bytes` wrote.

        Raises:
            ConfigError: anything but exactly such bytes.
        """
        try:
            return cls._parse(data)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError, struct.error) as error:
            raise ConfigError("update", f"{len(data)} bytes", "must be an encoded update") from error

    @classmethod
    def _parse(cls, data: bytes) -> Update:
        if not data.startswith(_MAGIC):
            raise ValueError("magic")
        start = len(_MAGIC) + 8
        (size,) = struct.unpack("<Q", data[len(_MAGIC) : start])
        if size > _MOST_HEADER_BYTES:
            raise ValueError("header size")
        header = json.loads(data[start : start + size])
        offset, tensors = start + size, {}
        for name, shape in header["tensors"]:
            if not all(isinstance(length, int) and length >= 0 for length in shape):
                raise ValueError("shape")
            count = int(np.prod(shape, dtype=object))
            tensors[str(name)] = np.frombuffer(data, dtype="<f4", count=count, offset=offset).reshape(shape)
            offset += 4 * count
        if offset != len(data) or len(tensors) != len(header["tensors"]):
            raise ValueError("length")
        update = cls(site=str(header["site"]), run=str(header["run"]), round=int(header["round"]), tensors=tensors)
        # One update has one encoding: no field beside these, no other type or spacing carries anything.
        if update._header() != data[start : start + size]:
            raise ValueError("header")
        return update


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """What a site's ledger has charged to a run so far; the lead derives the site's epsilon from it.

    Attributes:
        charged_rounds: rounds reserved, whether or not a reply came of them.
        sequence: number of the ledger's newest entry.
    """

    site: str
    run: str
    charged_rounds: int
    charged_steps: int
    sequence: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """A reply without an update.  `asked` and `allowed` come from the request and the plan only."""

    site: str
    run: str
    round: int
    reason: Reason
    asked: str | None = None
    allowed: str | None = None


class Refused(RefusedError):
    """Raised at a site to answer with a refusal."""

    def __init__(self, reason: Reason, *, asked: object = None, allowed: object = None) -> None:
        self.reason = reason
        self.asked = None if asked is None else str(asked)
        self.allowed = None if allowed is None else str(allowed)
        super().__init__(f"{reason}: asked for {self.asked}, allowed is {self.allowed}")

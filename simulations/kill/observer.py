"""What the world outside a site sees: every reply, word for word, and what it asked for.

A process tells its parent of each reply through a pipe, in one write that a kill cannot tear, before anybody else gets
the reply.  What trains and what fails is told too, for checks that are stricter than what an observer could make.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedtune.federation.protocol import Reply, RoundRequest, Signed
from fedtune.model.adapter import Adapter
from fedtune.privacy.release import Receipt, Update

_MAX_BYTES = 4096  # PIPE_BUF: a write of so much is whole or not there at all


class Outside:
    """The way out of a process.

    Args:
        pipe: descriptor that the parent reads.
        requests: folder in which every request is kept that was ever sent.
    """

    def __init__(self, pipe: int, requests: Path) -> None:
        self._pipe, self._requests = pipe, requests

    def tell(self, what: str, **fields: object) -> None:
        """One line to the parent."""
        line = json.dumps({"what": what, **fields}).encode() + b"\n"
        assert len(line) <= _MAX_BYTES, "a longer line could be torn"
        os.write(self._pipe, line)

    def request(self, signed: Signed, adapter: Adapter) -> None:
        """Keep what is about to be asked."""
        request = RoundRequest.from_signed(signed)
        path = self._requests / f"{request.round:03d}-{request.site}-{request.digest()}"
        if not path.exists():
            partial = path.with_suffix(".partial")
            partial.write_bytes(pickle.dumps((signed, dict(adapter.tensors))))
            partial.rename(path)

    def reply(self, signed: Signed, reply: Reply) -> None:
        """A reply leaves."""
        body, receipt = reply.body, None if reply.receipt is None else asdict(reply.receipt)
        about = {"site": body.site, "round": body.round, "request": RoundRequest.from_signed(signed).digest()}
        if isinstance(body, Update):
            sha256 = hashlib.sha256(body.to_bytes()).hexdigest()
            self.tell("update", **about, sha256=sha256, noise=Adapter(body.tensors).digest(), receipt=receipt)
        else:
            self.tell("refusal", **about, reason=body.reason.value, receipt=receipt)


def kept_requests(folder: Path) -> list[tuple[RoundRequest, Adapter]]:
    """Every request that was sent, in the order of the rounds."""
    kept = [pickle.loads(path.read_bytes()) for path in sorted(folder.glob("*")) if path.suffix != ".partial"]
    return [(RoundRequest.from_signed(signed), Adapter(tensors)) for signed, tensors in kept]


@dataclass
class Seen:
    """What came through the pipe about one site.

    Attributes:
        updates: request digest -> SHA-256 of each different update that answered it.
        released: digests of the tensors that left.
        begun: trainings that began, whether or not they ended.
        admitted: users whom any of them could sample, where people arrive over time.
        trained: digest of what each finished training made, whether or not it left.
        refusals: (request digest, reason) of each refusal; a site records a repeated one once a day.
        failures: what should never be seen.
    """

    updates: dict[str, set[str]] = field(default_factory=dict)
    released: set[str] = field(default_factory=set)
    begun: int = 0
    admitted: set[str] = field(default_factory=set)
    trained: list[str] = field(default_factory=list)
    refusals: set[tuple[str, str]] = field(default_factory=set)
    receipt: Receipt | None = None
    failures: list[str] = field(default_factory=list)

    @property
    def num_updates(self) -> int:
        """How many different noisy updates an observer holds."""
        return len(set().union(*self.updates.values())) if self.updates else 0

    def add(self, told: dict[str, Any]) -> None:
        """Take one line into account."""
        match told["what"]:
            case "update":
                self.updates.setdefault(told["request"], set()).add(told["sha256"])
                self.released.add(told["noise"])
            case "refusal":
                self.refusals.add((told["request"], told["reason"]))
            case "begun":
                self.begun += 1
                self.admitted.update(told["admitted"])
            case "trained":
                self.trained.append(told["noise"])
            case "failed":
                self.failures.append(told["error"])
        if told.get("receipt") is not None:
            receipt = Receipt.from_json(told["receipt"])
            assert receipt.has_valid_signature()
            if self.receipt is None or receipt.sequence >= self.receipt.sequence:
                self.receipt = receipt


def sort_out(lines: list[dict[str, Any]], seen: dict[str, Seen]) -> None:
    """Add what was told to what was seen before, by site."""
    for told in lines:
        if "site" in told:
            seen.setdefault(told["site"], Seen()).add(told)

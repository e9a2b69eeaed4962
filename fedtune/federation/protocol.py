"""What a server asks of a site, and what a site answers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from fedtune.privacy.plan import Plan
from fedtune.privacy.release import Receipt, Refusal, Update
from fedtune.spec import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundRequest:
    """The server's proposal for one round at one site.

    Attributes:
        run: identifies the run; the digest of its configuration and its name.
        round: from 1.
        adapter_digest: of the adapter that travels with the request.
        receipt_sequence: ledger entry of the last receipt that the lead has of the site, 0 for none; a ledger that does
            not reach it was lost or put back.
    """

    run: str
    round: int
    site: str
    adapter_digest: str
    plan: Plan
    receipt_sequence: int = 0

    def to_json(self) -> str:
        """Canonical JSON."""
        return json.dumps({**self._asked(), "receipt_sequence": self.receipt_sequence}, sort_keys=True)

    def _asked(self) -> dict[str, object]:
        """What is asked for; what the lead knows of the ledger is no part of it, and may differ when it asks again."""
        fields = {name: getattr(self, name) for name in ("run", "round", "site", "adapter_digest")}
        return {**fields, "plan": self.plan.to_json()}

    @classmethod
    def from_json(cls, text: str) -> RoundRequest:
        """The request that `to_json` wrote.

        Raises:
            ConfigError: anything else.
        """
        try:
            fields = json.loads(text)
            request = cls(**{**fields, "plan": Plan(**fields["plan"])})
            right = all(isinstance(getattr(request, name), str) for name in ("run", "site", "adapter_digest"))
            counts = (request.round, request.receipt_sequence)
            if not right or any(type(count) is not int for count in counts) or request.round < 1:
                raise ValueError("wrong type")
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError("request", text[:80], "must be a round request") from error
        return request

    def digest(self) -> str:
        """SHA-256, in hex, of what is asked for: two requests with one digest ask for the same thing."""
        return hashlib.sha256(json.dumps(self._asked(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """A site's answer: what it releases, and what its ledger has charged so far (None: it cannot read its ledger)."""

    body: Update | Refusal
    receipt: Receipt | None

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
    """

    run: str
    round: int
    site: str
    adapter_digest: str
    plan: Plan

    def to_json(self) -> str:
        """Canonical JSON."""
        fields = {name: getattr(self, name) for name in ("run", "round", "site", "adapter_digest")}
        return json.dumps(fields | {"plan": self.plan.to_json()}, sort_keys=True)

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
            if not right or type(request.round) is not int or request.round < 1:
                raise ValueError("wrong type")
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError("request", text[:80], "must be a round request") from error
        return request

    def digest(self) -> str:
        """SHA-256 of the canonical JSON, in hex: two requests with one digest ask for the same thing."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """A site's answer: what it releases, and what its ledger has charged so far (None: it cannot read its ledger)."""

    body: Update | Refusal
    receipt: Receipt | None

"""Settings of an audit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from fedtune.api.compose import parse_override_key, parse_override_value
from fedtune.codec import require
from fedtune.config import RunConfig, convert_first_error
from fedtune.report.attacks import check_confidence
from fedtune.spec import ConfigError, check_at_least, check_fraction, spec

PREFIX = "audit."
"""Key prefix of the audit's settings among a run's overrides."""


@spec
class AuditSpec:
    """Settings of an audit (`audit.*`).

    Attributes:
        kind: "gradient": canaries have gradients far above the clip norm, and the attacker sees every noisy step.
            "records": canaries are artificial records, and the attacker sees the final model's losses, which also
            give membership-inference baselines on real records.  "sensitivity": no run; search for a case in which an
            additional unit changes the clean sum of a step by more than the clip norm.
        canaries: number of canaries per audited site, each inserted by its own coin toss.
        guesses: number of guesses per site, fixed in advance; null: one per canary.  With fewer guesses, the bound is
            tighter for a correct implementation; with more guesses, the maximum possible bound is higher.
        confidence: confidence level of each lower bound, and of the verdict over all bounds; at least 0.9.
        sites: sites with canaries; empty: every participating site.
        non_members: fraction of each site's records held out for comparison if `kind` is "records" and
            `data.heldout_fraction` is 0.
        tries: number of cases in a sensitivity search.
    """

    kind: Literal["gradient", "records", "sensitivity"] = "gradient"
    canaries: int = 1000
    guesses: int | None = None
    confidence: float = 0.95
    sites: tuple[str, ...] = ()
    non_members: float = 0.3
    tries: int = 200

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> AuditSpec:
        """Build the settings from values by field name.

        Raises:
            ConfigError: a field is unknown, or a value has the wrong type.
        """
        known = [field.name for field in fields(cls)]
        if other := [key for key in given if key not in known]:
            bound = f"is not an audit setting ({', '.join(known)})"
            raise ConfigError(f"audit.{other[0]}", given[other[0]], bound)
        for key, value in given.items():  # no setting is a boolean, which pydantic would convert to 1 or 0
            require(f"audit.{key}", value, not isinstance(value, bool), "must be a number")
        try:
            return TypeAdapter(cls).validate_python(dict(given))
        except ValidationError as error:
            raise convert_first_error(error).under("audit") from None

    def __post_init__(self) -> None:
        check_at_least("tries", self.tries, 1)
        check_at_least("canaries", self.canaries, 2)
        if self.guesses is not None:
            check_at_least("guesses", self.guesses, 1)
            if self.guesses > self.canaries:
                raise ConfigError("guesses", self.guesses, f"must not exceed audit.canaries = {self.canaries}")
        check_confidence(self.confidence)
        check_fraction("non_members", self.non_members)
        for site in self.sites:
            if self.sites.count(site) > 1:
                raise ConfigError("sites", site, "is named twice")


def require_guarantee(config: RunConfig) -> None:
    """Raise a ConfigError for a run without a privacy guarantee, which has nothing to audit."""
    bound = "has no privacy guarantee to audit: choose another privacy.mechanism"
    require("privacy", config.privacy.mechanism, config.privacy.private, bound)


def parse_audit_spec(overrides: Sequence[str]) -> AuditSpec:
    """Build the audit's settings from overrides such as `audit.canaries=500`."""
    given = {parse_override_key(override): parse_override_value(override) for override in overrides}
    return AuditSpec.from_mapping({key.removeprefix(PREFIX): value for key, value in given.items()})

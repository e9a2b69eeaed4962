"""The settings of an audit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from fedtune.api.compose import override_key, override_value
from fedtune.config import convert_first_error
from fedtune.evaluation.audit_bound import LEAST_CONFIDENCE
from fedtune.spec import ConfigError, check_at_least, check_fraction, spec

PREFIX = "audit."
"""Of the keys of an audit's own settings among a run's overrides."""


@spec
class AuditSpec:
    """How a simulated run is attacked.

    Attributes:
        kind: "gradient": canaries have gradients far beyond the clip norm, and the attacker sees every noisy step.
            "records": canaries are artificial records, and the attacker sees the final model's losses; the losses also
            serve for membership inference on real records.  "sensitivity": no run; search for a case in which one
            additional unit moves the clean sum of a step by more than the clip norm.
        canaries: canaries per audited site, each inserted by its own coin toss.
        guesses: canaries per site on which the attacker does not abstain; null: all of them.  Fixed in advance: fewer
            guesses come closer to what a sound run leaks, more guesses to the highest bound that the canaries allow.
        confidence: the confidence of each lower bound, and of the verdict over all bounds; at least 0.9.
        sites: names of the sites that get canaries; empty: every participating site.
        never_used: share of each site's records held out for comparison if `kind` is "records" and
            `data.heldout_fraction` is 0.
        tries: number of cases in a search for sensitivity violations.
    """

    kind: Literal["gradient", "records", "sensitivity"] = "gradient"
    canaries: int = 1000
    guesses: int | None = None
    confidence: float = 0.95
    sites: tuple[str, ...] = ()
    never_used: float = 0.3
    tries: int = 200

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> AuditSpec:
        """Build the settings from a mapping of names to values.

        Raises:
            ConfigError: a name is unknown, or a value has the wrong type.
        """
        known = [field.name for field in fields(cls)]
        if other := [key for key in given if key not in known]:
            bound = f"is not an audit setting ({', '.join(known)})"
            raise ConfigError(f"audit.{other[0]}", given[other[0]], bound)
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
                raise ConfigError("guesses", self.guesses, f"must be at most audit.canaries = {self.canaries}")
        if not LEAST_CONFIDENCE <= self.confidence < 1:
            raise ConfigError("confidence", self.confidence, f"must be in [{LEAST_CONFIDENCE}, 1)")
        check_fraction("never_used", self.never_used)
        for site in self.sites:
            if self.sites.count(site) > 1:
                raise ConfigError("sites", site, "is named twice")


def parse_audit_spec(overrides: Sequence[str]) -> AuditSpec:
    """Build the audit's own settings from overrides such as `audit.canaries=500`."""
    given = {override_key(override): override_value(override) for override in overrides}
    for key, value in given.items():
        if isinstance(value, bool):
            raise ConfigError(key, str(value), "must be a single value, not a list or a mapping")
    return AuditSpec.from_mapping({key.removeprefix(PREFIX): value for key, value in given.items()})

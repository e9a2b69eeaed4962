"""The findings of an attempt to break the guarantee, as a report holds them."""

from __future__ import annotations

from fedtune.spec import ConfigError, spec


@spec
class AuditBound:
    """An empirical lower bound on epsilon, and what `canaries` planted records could show at most.

    `site` None: on the aggregated model, over all audited sites.
    """

    site: str | None
    claimed_epsilon: float
    lower_bound: float
    best_possible: float
    canaries: int
    guesses: int
    right: int


@spec
class AuditHitRate:
    """Share of the records trained on that an attack finds with a share of false alarms; None: too few to say."""

    false_alarms: float
    found: float | None
    low: float | None
    high: float | None


@spec
class AuditMembership:
    """How well a score tells real records that were trained on from others; `site` as in `AuditBound`."""

    site: str | None
    score: str
    trained_on: int
    never_used: int
    auroc: float
    auroc_low: float
    auroc_high: float
    hit_rates: tuple[AuditHitRate, ...]

    def __post_init__(self) -> None:
        if not self.hit_rates:
            raise ConfigError("hit_rates", [], "must have at least one, as every attack by membership has")


@spec
class Audit:
    """What an attempt to break the guarantee showed, each figure with `confidence` by itself.

    `exceeded`: a lower bound is above its claim, so that the implementation or the claim is wrong.
    """

    method: str
    confidence: float
    delta: float
    seeded: bool
    exceeded: bool
    bounds: tuple[AuditBound, ...]
    membership: tuple[AuditMembership, ...]

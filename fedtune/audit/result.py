"""What an audit found: `audit.json` in the run folder, which the run's report shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from fedtune.evaluation.one_run import allowed_errors, p_value
from fedtune.privacy.durable import write_durably
from fedtune.spec import RunError, spec

FILE = "audit.json"
MARK = "AUDIT.txt"
SCHEMA_VERSION = 1
Place = str | None
"""A site; None: the aggregated model, which the server and every other site see."""

_MARK = """\
This folder is an audit. Among the training data were {what},
planted on purpose, and the adapter has learnt from them. Use it for nothing else; train again without an audit.
"""


@spec
class Bound:
    """A lower bound on epsilon, and what it was made of.

    Attributes:
        site: whose canaries; None: the canaries of all audited sites, against the aggregated model.
        claimed_epsilon: what the run charged there by the PLD accountant.
        lower_bound: what the attack showed.
        best_possible: what the same attack would have shown with every guess right.
        canaries: each in or out by a coin of its own.
        guesses: about so many of them.
        right: so many of the guesses.
    """

    site: Place
    claimed_epsilon: float
    lower_bound: float
    best_possible: float
    canaries: int
    guesses: int
    right: int


@spec
class HitRate:
    """Share of the records trained on that an attack finds; None: too few other records to measure so few errors.

    Attributes:
        false_alarms: at most so large a share of the records never used is taken for trained on.
        found: of the records trained on.
        low: end of the confidence interval.
        high: its other end.
    """

    false_alarms: float
    found: float | None
    low: float | None
    high: float | None


@spec
class Membership:
    """How well an attack tells records trained on from records never used, by the final model.

    Attributes:
        site: whose records; None: those of all audited sites.
        score: "loss", or "reference_ratio": against the loss before training.
        trained_on: real records of that kind.
        never_used: of the other.
        auroc: 0.5 is guessing; with the ends of its confidence interval.
    """

    site: Place
    score: Literal["loss", "reference_ratio"]
    trained_on: int
    never_used: int
    auroc: float
    auroc_low: float
    auroc_high: float
    hit_rates: tuple[HitRate, ...]


@spec
class AuditResult:
    """A finished audit.

    Attributes:
        method: "gradient_canaries" or "record_canaries".
        confidence: of each bound and each interval by itself.
        delta: at which epsilons are stated.
        seeded: whether coins and noise came from a seed: a study without a guarantee.
        bounds: of each audited site, then of the aggregated model.
        membership: likewise, where records were planted.
        exceeded: whether any bound would be above its claim if all were to hold together with `confidence`.
    """

    method: Literal["gradient_canaries", "record_canaries"]
    confidence: float
    delta: float
    seeded: bool
    bounds: tuple[Bound, ...]
    membership: tuple[Membership, ...]
    exceeded: bool
    schema_version: Literal[1] = 1

    def refuted(self) -> tuple[Bound, ...]:
        """The bounds whose claim cannot be true, at the confidence that `exceeded` is judged by."""
        return refuted(self.bounds, delta=self.delta, confidence=self.confidence)


def refuted(bounds: Sequence[Bound], *, delta: float, confidence: float) -> tuple[Bound, ...]:
    """The bounds whose claim cannot be true, each with so much confidence that all of them hold together with it."""
    errors = allowed_errors(confidence, [bound.site for bound in bounds])

    def is_refuted(bound: Bound, error: float) -> bool:
        counts = bound.canaries, bound.guesses, bound.right
        return p_value(*counts, epsilon=bound.claimed_epsilon, delta=delta) < error

    return tuple(bound for bound, error in zip(bounds, errors, strict=True) if is_refuted(bound, error))


_ADAPTER = TypeAdapter(AuditResult)


def write_result(folder: Path, result: AuditResult) -> None:
    """Write `audit.json`."""
    text = json.dumps(_ADAPTER.dump_python(result, mode="json"), indent=1, allow_nan=False)
    write_durably(folder / FILE, text.encode() + b"\n")


def read_result(folder: Path) -> AuditResult:
    """What `write_result` wrote.

    Raises:
        RunError: there is no such file, or it is damaged.
    """
    try:
        return _ADAPTER.validate_json((folder / FILE).read_bytes(), strict=True)
    except (OSError, ValidationError) as error:
        raise RunError(f"{folder / FILE} is missing or damaged: {error}") from error


def mark(folder: Path, what: str) -> None:
    """Say in the folder, before anything is trained, that its adapter holds canaries."""
    write_durably(folder / MARK, _MARK.format(what=what).encode())


def json_schema() -> Mapping[str, Any]:
    """Of `audit.json`."""
    return _ADAPTER.json_schema(mode="serialization")

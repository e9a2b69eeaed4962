"""What the live page of a run shows, as data, and as the JSON that it asks for again and again.

None says that nothing bounds an epsilon, or that something is not known.  Times are UTC in ISO form.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from fedtune.report.model import Scores
from fedtune.spec import spec

Phase = Literal["waiting", "preparing", "running", "finished", "stopped", "unreadable"]
Mark = Literal["no_noise", "seeded_noise", "above_target"]


@spec
class Answer:
    """What a site last did.

    Attributes:
        what: "update", the reason why there is none, "asked" while nothing came, "nothing" before that.
        round: in which; None: not known.
    """

    what: str
    round: int | None


@spec
class Step:
    """Epsilon after a finished round."""

    round: int
    epsilon: float | None


@spec
class SiteNow:
    """One site.

    Attributes:
        updates: finished rounds that it took part in, and `failures` those that it did not.
        charged: rounds.
        upper_bound: a round is under way or was not answered, and is counted as charged.
        steps: by finished round.
    """

    site: str
    latest: Answer
    updates: int
    failures: int
    charged: int
    epsilon: float | None
    upper_bound: bool
    steps: tuple[Step, ...]


@spec
class RoundDone:
    """A finished round; scores are exact, on the lead's validation file."""

    round: int
    ended: str | None
    seconds: float
    bytes_down: int
    bytes_up: int
    scores: Scores


@spec
class Failure:
    """Why a round went without a site; the newest come first."""

    round: int
    site: str
    reason: str


@spec
class Left:
    """Time until the last round is done, at the pace so far; rounded up."""

    value: int
    unit: Literal["seconds", "minutes", "hours"]


@spec
class RunNow:
    """A run at one moment.

    Attributes:
        problem: why the folder cannot be read, in English.
        marks: what the report's verdict would be for, were it written now.
        under_way: number of the round that was asked for and is not finished.
        ended: when the newest round was finished.
        epsilon: of the site that spent most, and `upper_bound` of the same.
        target_epsilon: None: the run promises nothing.
    """

    name: str
    phase: Phase
    problem: str | None
    simulated: bool
    marks: tuple[Mark, ...]
    unit: str
    delta: float
    target_epsilon: float | None
    rounds_done: int
    rounds_planned: int
    under_way: int | None
    ended: str | None
    left: Left | None
    epsilon: float | None
    upper_bound: bool
    sites: tuple[SiteNow, ...]
    rounds: tuple[RoundDone, ...]
    failures: tuple[Failure, ...]
    seconds: float
    bytes_down: int
    bytes_up: int
    final: Scores


def to_json(now: RunNow) -> dict[str, Any]:
    """Plain JSON, whose places the page's figures name."""
    return asdict(now)

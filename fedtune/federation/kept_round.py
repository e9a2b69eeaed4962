"""Which round's adapter a run keeps, and whether its scores end it: by the lead's own validation file alone.

Guarantee: what is decided here follows from adapters, which the sites released, and from a file that holds no record of
a site.  So it costs no privacy, and the whole plan's epsilon holds whatever is decided.  The epsilon of the rounds that
were charged is no proof for a run that its scores ended: they picked the moment (docs/guarantee.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedtune.evaluation.bootstrap import direction
from fedtune.federation.spec import FederationSpec
from fedtune.privacy.release import Reason
from fedtune.spec import spec
from fedtune.words import finite

if TYPE_CHECKING:  # importing it loads adapter code, which a reader of reports does not need
    from fedtune.federation.lead import RoundResult


@spec
class Kept:
    """The decision of a run's validation scores.

    Attributes:
        round: whose adapter is the run's.
        judged_by: the score that decided.
        score: of that round on the lead's validation file; None: it is no finite number.
        ended_early: `federation.stop_after` rounds brought no better score, and others were still to come.
    """

    round: int
    judged_by: str
    score: float | None
    ended_early: bool


def kept_of(rounds: Sequence[RoundResult], federation: FederationSpec, *, judged_by: str) -> Kept | None:
    """The decision of the finished `rounds`' scores; None: nothing, by the settings, or no round is finished."""
    if not federation.chooses or not rounds:
        return None
    sign = direction(judged_by)

    def gain(result: RoundResult) -> float:
        score = finite(result.metrics.get(judged_by))
        return -float("inf") if score is None else sign * score

    best = max(rounds, key=gain)  # of equals the first: later ones brought nothing
    # A round without a usable update keeps the score before it, so it is no failed try.
    waited = sum(one.round > best.round for one in rounds if one.sites)
    stops = federation.stop_after is not None and waited >= federation.stop_after
    kept = best if federation.keep_round == "best" else rounds[-1]
    return Kept(
        round=kept.round,
        judged_by=judged_by,
        score=finite(kept.metrics.get(judged_by)),
        ended_early=stops and len(rounds) < rounds_in_all(rounds, federation),
    )


def rounds_in_all(rounds: Sequence[RoundResult], federation: FederationSpec) -> int:
    """How many rounds a run takes as things stand: spare ones replace rounds without a usable update."""
    return federation.num_rounds + min(federation.spare_rounds, sum(not one.sites for one in rounds))


def is_over(rounds: Sequence[RoundResult], federation: FederationSpec, *, judged_by: str) -> bool:
    """A run with these finished rounds has no other to come."""
    if is_used_up(rounds):
        return True
    kept = kept_of(rounds, federation, judged_by=judged_by)
    return len(rounds) >= rounds_in_all(rounds, federation) or (kept is not None and kept.ended_early)


def is_used_up(rounds: Sequence[RoundResult]) -> bool:
    """The newest round brought nothing, because too few sites had a round of the run's plan left.

    A site charges a round before it trains, so a round that was interrupted counts, and is charged again when it is
    trained again.  The plan's last round is then missing, unless it has a spare one.
    """
    return bool(rounds) and not rounds[-1].sites and Reason.PLAN_EXHAUSTED in rounds[-1].failed_sites.values()


def used_up_text(rounds: Sequence[RoundResult], federation: FederationSpec) -> str:
    """Which round of a run is missing because its plan was used up, and what would have kept it; empty if none is."""
    if not is_used_up(rounds):
        return ""
    missing, spare = rounds[-1], federation.spare_rounds
    sites = ", ".join(site for site, reason in missing.failed_sites.items() if reason == Reason.PLAN_EXHAUSTED)
    return (
        f"Round {missing.round} of {federation.num_rounds + spare} is missing, and the run is over without it: an "
        f"earlier round was interrupted after it was charged, and charged again, so the plan of {sites} is used up. "
        f"federation.spare_rounds={spare + 1} would have kept it"
    )


def again_text(round: int) -> str:
    """What a run that is resumed says of a round that was asked for and is not over."""
    return (
        f"Round {round} was interrupted: a site that was charged for it and had no answer yet is charged again. If no "
        "spare round is left (federation.spare_rounds), the last round of its plan will be missing."
    )

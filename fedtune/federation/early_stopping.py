"""Checkpoint selection and early stopping by scores on the lead's own validation file.

Guarantee: the decision depends only on released adapters and on a file without any site's records, so it has no privacy
cost, and the epsilon of the whole plan holds regardless of the decision.  After early stopping, the epsilon of the
charged rounds alone is not proved, because the scores chose when to stop (docs/guarantee.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedtune.evaluation.bootstrap import get_score_direction
from fedtune.federation.spec import FederationSpec
from fedtune.formatting import convert_infinite_to_none
from fedtune.privacy.release import Reason
from fedtune.spec import spec

if TYPE_CHECKING:  # its import loads adapter code, which reports do not need
    from fedtune.federation.lead import RoundResult


@spec
class SelectedRound:
    """Result of checkpoint selection: the selected round and its validation score.

    Attributes:
        round: the round that produced the run's adapter.
        primary_metric: the metric used for the selection.
        score: the score of that round on the lead's validation file; None if it is not finite.
        stopped_early: whether early stopping ended the run before its last round, after
            `federation.early_stopping_patience` rounds without a better score.
    """

    round: int
    primary_metric: str
    score: float | None
    stopped_early: bool


def select_round(
    rounds: Sequence[RoundResult], federation: FederationSpec, *, primary_metric: str
) -> SelectedRound | None:
    """Select the checkpoint to keep and decide on early stopping, from the scores of the finished rounds.

    Returns None if the settings use neither feature, or no round is finished.
    """
    if not federation.uses_validation_scores or not rounds:
        return None
    sign = get_score_direction(primary_metric)

    def compute_gain(result: RoundResult) -> float:
        score = convert_infinite_to_none(result.metrics.get(primary_metric))
        return -float("inf") if score is None else sign * score

    best = max(rounds, key=compute_gain)  # the earliest on ties
    # A round without a usable update does not change the score, so it does not count against the patience.
    waited = sum(result.round > best.round for result in rounds if result.sites)
    stops = federation.early_stopping_patience is not None and waited >= federation.early_stopping_patience
    kept = best if federation.checkpoint_selection == "best" else rounds[-1]
    return SelectedRound(
        round=kept.round,
        primary_metric=primary_metric,
        score=convert_infinite_to_none(kept.metrics.get(primary_metric)),
        stopped_early=stops and len(rounds) < count_rounds(rounds, federation),
    )


def count_rounds(rounds: Sequence[RoundResult], federation: FederationSpec) -> int:
    """Count the rounds of a run, including one spare round for each round without a usable update so far."""
    return federation.num_rounds + min(federation.spare_rounds, sum(not result.sites for result in rounds))


def should_stop(rounds: Sequence[RoundResult], federation: FederationSpec, *, primary_metric: str) -> bool:
    """Return True if the run ends after these finished rounds, by early stopping or because no round is left."""
    if is_budget_used_up(rounds):
        return True
    kept = select_round(rounds, federation, primary_metric=primary_metric)
    return len(rounds) >= count_rounds(rounds, federation) or (kept is not None and kept.stopped_early)


def is_budget_used_up(rounds: Sequence[RoundResult]) -> bool:
    """Return True if the newest round failed because too few sites had a round left in their plan.

    A site charges a round before training, so an interrupted round is charged twice when it is repeated.  The plan then
    lacks its last round, unless it has a spare round.
    """
    return bool(rounds) and not rounds[-1].sites and Reason.PLAN_EXHAUSTED in rounds[-1].failed_sites.values()


def explain_exhausted_plan(rounds: Sequence[RoundResult], federation: FederationSpec) -> str:
    """Explain why a round is missing after sites exhausted their plan; empty if no round is missing.

    The text names these sites and the setting that avoids the problem.
    """
    if not is_budget_used_up(rounds):
        return ""
    missing, spare = rounds[-1], federation.spare_rounds
    sites = ", ".join(site for site, reason in missing.failed_sites.items() if reason == Reason.PLAN_EXHAUSTED)
    return (
        f"Round {missing.round} of {federation.num_rounds + spare} is missing: an earlier round was interrupted after "
        f"it was charged, and was charged again, which exhausted the plan of {sites}. Set "
        f"federation.spare_rounds={spare + 1} in the next run to allow for an interruption"
    )


def warn_of_interrupted_round(round: int) -> str:
    """Return the warning that a resumed run prints about its interrupted round."""
    return (
        f"Round {round} was interrupted: sites that were charged for it but did not answer are charged again. If no "
        "spare round is left (federation.spare_rounds), their plan will lack its last round."
    )

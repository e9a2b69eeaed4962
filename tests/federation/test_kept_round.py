"""Which round a run keeps, and when its validation scores end it."""

from collections.abc import Collection, Sequence
from typing import Any

import pytest

from fedtune.federation.kept_round import Kept, is_over, kept_of
from fedtune.federation.lead import RoundResult
from fedtune.federation.spec import FederationSpec

from .conftest import round_of


def rounds(*scores: float | None, name: str = "accuracy", lost: Collection[int] = ()) -> Sequence[RoundResult]:
    """Of one site, whose updates did not come in the rounds `lost`."""
    return [
        round_of(number, sites=() if number in lost else ("a",), metrics={name: score})
        for number, score in enumerate(scores, 1)
    ]


def kept(*scores: float | None, name: str = "accuracy", **settings: Any) -> Kept | None:
    federation = FederationSpec(**({"num_rounds": 9, "keep_round": "best"} | settings))
    return kept_of(rounds(*scores, name=name), federation, judged_by=name)


@pytest.mark.parametrize(
    ("scores", "name", "best"),
    [
        ((0.5, 0.75, 0.25), "accuracy", 2),
        ((0.5, 0.75, 0.25), "loss", 3),
        ((0.25, 0.5, 0.5), "accuracy", 2),  # a later one that is no better brings nothing
        ((None, float("nan"), 0.125, float("inf")), "accuracy", 3),
        ((None, None), "accuracy", 1),
    ],
)
def test_the_best_round_is_the_first_of_the_best_scores(scores: Sequence[float | None], name: str, best: int) -> None:
    found = kept(*scores, name=name)
    assert (found.round, found.judged_by, found.ended_early) == (best, name, False)


def test_without_the_settings_nothing_is_decided() -> None:
    assert kept(0.5, 0.25, keep_round="last") is None
    assert kept() is None
    # The last planned round ends nothing early.
    found = kept(0.5, 0.25, 0.25, stop_after=2, num_rounds=3)
    assert found == Kept(round=1, judged_by="accuracy", score=0.5, ended_early=False)


def test_rounds_without_a_better_score_end_the_run() -> None:
    ended = {scores: kept(*scores, stop_after=2) for scores in ((0.5, 0.25), (0.5, 0.25, 0.5), (0.5, 0.25, 0.75))}
    assert [found.ended_early for found in ended.values() if found] == [False, True, False]
    # What ends a run says nothing of which round it keeps.
    last = kept(0.5, 0.25, 0.375, stop_after=2, keep_round="last")
    assert last == Kept(round=3, judged_by="accuracy", score=0.375, ended_early=True)


def test_a_round_without_updates_is_no_trial_that_brought_nothing() -> None:
    """It has the score of the round before it; after a lead's restart there may be several in a row."""
    federation = FederationSpec(num_rounds=9, stop_after=1)
    for lost, over in (((3, 4), False), ((), True), ((4,), True)):
        found = kept_of(rounds(0.25, 0.5, 0.5, 0.5, lost=lost), federation, judged_by="accuracy")
        assert found.ended_early is over


def test_when_a_run_is_over() -> None:
    stopping = FederationSpec(num_rounds=4, stop_after=1)
    scores = (0.5, 0.75, 0.75)
    over = [is_over(rounds(*scores[:count]), stopping, judged_by="accuracy") for count in range(4)]
    assert over == [False, False, False, True]
    plain = FederationSpec(num_rounds=3)
    assert [is_over(rounds(*scores[:count]), plain, judged_by="accuracy") for count in (2, 3)] == [False, True]

"""Checkpoint selection and early stopping by validation scores."""

from collections.abc import Collection, Sequence
from typing import Any

import pytest

from fedtune.federation.early_stopping import SelectedRound, explain_exhausted_plan, select_round, should_stop
from fedtune.federation.lead import RoundResult
from fedtune.federation.spec import FederationSpec

from .conftest import round_of


def make_rounds(*scores: float | None, name: str = "accuracy", lost: Collection[int] = ()) -> Sequence[RoundResult]:
    """Build rounds of one site, without an update in the rounds `lost`."""
    return [
        round_of(number, sites=() if number in lost else ("a",), metrics={name: score})
        for number, score in enumerate(scores, 1)
    ]


def select_from_scores(*scores: float | None, name: str = "accuracy", **settings: Any) -> SelectedRound | None:
    federation = FederationSpec(**({"num_rounds": 9, "checkpoint_selection": "best"} | settings))
    return select_round(make_rounds(*scores, name=name), federation, primary_metric=name)


@pytest.mark.parametrize(
    ("scores", "name", "best"),
    [
        ((0.5, 0.75, 0.25), "accuracy", 2),
        ((0.5, 0.75, 0.25), "loss", 3),
        ((0.25, 0.5, 0.5), "accuracy", 2),  # a later round that is no better changes nothing
        ((None, float("nan"), 0.125, float("inf")), "accuracy", 3),
        ((None, None), "accuracy", 1),
    ],
)
def test_best_round_is_the_first_with_the_best_score(scores: Sequence[float | None], name: str, best: int) -> None:
    selected = select_from_scores(*scores, name=name)
    assert (selected.round, selected.primary_metric, selected.stopped_early) == (best, name, False)


def test_no_checkpoint_is_selected_without_the_settings() -> None:
    assert select_from_scores(0.5, 0.25, checkpoint_selection="last") is None
    assert select_from_scores() is None
    # After the last planned round nothing is stopped early.
    selected = select_from_scores(0.5, 0.25, 0.25, early_stopping_patience=2, num_rounds=3)
    assert selected == SelectedRound(round=1, primary_metric="accuracy", score=0.5, stopped_early=False)


def test_early_stopping_ends_after_rounds_without_improvement() -> None:
    selections = {
        scores: select_from_scores(*scores, early_stopping_patience=2)
        for scores in ((0.5, 0.25), (0.5, 0.25, 0.5), (0.5, 0.25, 0.75))
    }
    assert [selected.stopped_early for selected in selections.values() if selected] == [False, True, False]
    # Early stopping does not determine which round is kept.
    selected = select_from_scores(0.5, 0.25, 0.375, early_stopping_patience=2, checkpoint_selection="last")
    assert selected == SelectedRound(round=3, primary_metric="accuracy", score=0.375, stopped_early=True)


def test_rounds_without_updates_do_not_count_toward_early_stopping() -> None:
    """Such a round keeps the previous score; a restart of the lead can cause several in a row."""
    federation = FederationSpec(num_rounds=9, early_stopping_patience=1)
    for lost, stopped in (((3, 4), False), ((), True), ((4,), True)):
        selected = select_round(make_rounds(0.25, 0.5, 0.5, 0.5, lost=lost), federation, primary_metric="accuracy")
        assert selected.stopped_early is stopped


def test_run_ends_after_its_last_round_or_early_stopping() -> None:
    stopping = FederationSpec(num_rounds=4, early_stopping_patience=1)
    scores = (0.5, 0.75, 0.75)
    stops = [should_stop(make_rounds(*scores[:count]), stopping, primary_metric="accuracy") for count in range(4)]
    assert stops == [False, False, False, True]
    plain = FederationSpec(num_rounds=3)
    assert [should_stop(make_rounds(*scores[:count]), plain, primary_metric="accuracy") for count in (2, 3)] == [
        False,
        True,
    ]


def test_exhausted_plan_ends_the_run_and_the_missing_round_is_explained() -> None:
    federation = FederationSpec(num_rounds=3, spare_rounds=1)
    last = round_of(3, sites=(), failed_sites={"a": "plan_exhausted", "b": "no_reply"}, metrics={"accuracy": 0.5})
    assert should_stop([*make_rounds(0.5, 0.5), last], federation, primary_metric="accuracy")
    reason = explain_exhausted_plan([*make_rounds(0.5, 0.5), last], federation)
    assert "Round 3 of 4 is missing" in reason
    assert "which exhausted the plan of a." in reason
    assert "Set federation.spare_rounds=2 in the next run" in reason
    for rounds in (
        make_rounds(0.5, 0.5),
        make_rounds(0.5, 0.5, 0.5, lost=(3,)),
        [round_of(1, sites=("b",), failed_sites={"a": "plan_exhausted"}, metrics={})],
    ):
        assert not should_stop(rounds, federation, primary_metric="accuracy")
        assert explain_exhausted_plan(rounds, federation) == ""

import json
import math
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.federation.lead import LeadState
from fedtune.privacy.run_plan import Plan
from fedtune.runs.results import DIVERGED, GUESS, WORSE, FinalResult, RunResult, find_problems

from ..builders import run_result
from ..conftest import run_plan
from ..federation.conftest import make_adapter, make_receipt, round_of


def build(*, charged: dict[str, int], loss: float = 0.5, plan: Plan | None = None, scores: Any = None) -> Any:
    receipts = {site: make_receipt(site, charged=rounds) for site, rounds in charged.items()}
    metrics = {"loss": loss, "accuracy": 0.5}
    result = round_of(1, sites=tuple(charged), metrics=metrics, site_scores=scores or {})
    state = LeadState(round=1, adapter=make_adapter(), receipts=receipts, rounds=[result])
    final = FinalResult(metrics={"loss": loss}, metrics_before={}, seconds=1.0, peak_memory_bytes=1)
    config: Any = SimpleNamespace(task="classification", digest=lambda: "00")
    config.federation, config.runtime = SimpleNamespace(active=tuple(charged)), SimpleNamespace(seeded_noise=False)
    provenance = run_result(rounds=(), final=final, privacy=None).provenance
    return asdict(RunResult.build(config, plan or run_plan(), state, final=final, provenance=provenance))


def test_epsilon_of_a_run_is_its_largest_site_epsilon() -> None:
    privacy = build(charged={"a": 1, "b": 3, "c": 0})["privacy"]
    a, b = (privacy["sites"][name] for name in ("a", "b"))
    # Three of four planned rounds: the claim covers the whole plan, as proved in guarantee.md.
    assert privacy["epsilon"] == b["planned_epsilon"] > b["epsilon"] > a["epsilon"] > 0
    zeros = dict.fromkeys(("epsilon", "epsilon_rdp", "rounds", "steps", "metrics_noise_multiplier"), 0)
    zeros |= {"sampling_rate": 0.2, "noise_multiplier": 4.0, "upper_bound": False}
    assert privacy["sites"]["c"] == zeros | {"planned_epsilon": privacy["sites"]["a"]["planned_epsilon"]}
    without_noise = build(charged={"a": 1, "b": 0}, plan=replace(run_plan(), noise_multiplier=0.0))["privacy"]
    assert (without_noise["epsilon"], without_noise["sites"]["a"]["epsilon"]) == (None, None)


def test_released_site_scores_are_shown_and_charged() -> None:
    unnoised, plan = build(charged={"a": 1}), replace(run_plan(), metrics_noise_multiplier=3.0)
    measured = build(charged={"a": 1}, plan=plan, scores={"a": (0.5, 1.25)})
    assert unnoised["rounds"][0]["site_scores"] == {}
    assert json.loads(json.dumps(measured))["rounds"][0]["site_scores"] == {"a": [0.5, 1.25]}
    assert measured["privacy"]["epsilon"] > unnoised["privacy"]["epsilon"]
    assert unnoised["privacy"]["sites"]["a"]["metrics_noise_multiplier"] == 0.0
    assert measured["privacy"]["sites"]["a"]["metrics_noise_multiplier"] == 3.0


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_diverged_loss_is_null_in_strict_json(loss: float) -> None:
    result = json.loads(json.dumps(build(charged={"a": 1}, loss=loss), allow_nan=False))
    assert result["rounds"][0]["metrics"] == {"loss": None, "accuracy": 0.5}
    assert result["final"]["metrics"] == {"loss": None}


GOOD = {"accuracy": 0.8, "loss": 0.7}
START = {"accuracy": 0.3, "loss": 1.0}


@pytest.mark.parametrize(
    ("before", "after", "problems"),
    [
        (START, GOOD, ()),
        (START, {"accuracy": 0.8, "loss": math.nan}, (DIVERGED,)),
        (START, {"accuracy": 0.8, "loss": None}, (DIVERGED,)),
        (START, {"accuracy": 0.8, "loss": 2.01}, (DIVERGED,)),
        (START, {"accuracy": 0.8, "loss": 1.99}, ()),
        ({"accuracy": 0.9, "loss": 1.0}, GOOD, (WORSE,)),
        ({"accuracy": 0.81, "loss": 1.0}, GOOD, ()),  # within the standard error of 100 rows
        (START, {"accuracy": 0.5, "loss": 0.7}, (GUESS,)),
        ({"accuracy": 0.9, "loss": 1.0}, {"accuracy": 0.5, "loss": 0.7}, (WORSE, GUESS)),
        ({}, {}, ()),
        ({}, GOOD, ()),
    ],
)
def test_findings_are_derived_from_scores_before_and_after_training(
    before: Any, after: Any, problems: tuple[str, ...]
) -> None:
    assert find_problems((), before, after, primary_metric="accuracy", guess=0.5, rows=100) == problems


def test_worse_scores_and_diverged_rounds_are_reported_as_findings() -> None:
    for score, before, after, found in (
        *(("loss", 2.0, 2.1, (WORSE,)), ("loss", 2.0, 1.9, ())),
        *(("spearman", 0.1, -0.2, (WORSE,)), ("spearman", -0.3, -0.2, ())),
    ):
        problems = find_problems((), {score: before}, {score: after}, primary_metric=score, guess=None, rows=100)
        assert problems == found
    rounds = [round_of(1, metrics=GOOD, diverged=True), round_of(2, metrics=GOOD)]
    assert find_problems(rounds, START, GOOD, primary_metric="accuracy", guess=0.5, rows=100) == (DIVERGED,)

"""Proposed trials: reproducible by seed and scores, within their ranges, with the requested distribution."""

import math
from itertools import product

import pytest

from fedtune.api.compose import SearchedSetting
from fedtune.lab.studies import trial_search
from fedtune.lab.studies.trial_search import Tpe, combine_extreme_values, draw_random_trials
from fedtune.lab.studies.trials import list_combinations
from fedtune.spec import ConfigError

RATE = SearchedSetting(key="training.learning_rate", low=0.001, high=0.1, log=True)
RANK = SearchedSetting(key="lora.rank", low=2, high=9)
HEAD = SearchedSetting(key="lora", choices=("attention", "all_linear"))


def test_grid_covers_every_combination_and_requires_finite_values() -> None:
    trials = list_combinations([HEAD, SearchedSetting(key="lora.rank", choices=("4", "8", "16"))])
    assert [tuple(trial.values()) for trial in trials] == [*product(("attention", "all_linear"), ("4", "8", "16"))]
    message = r"^training.learning_rate = '0.001 to 0.1': has infinitely many values: list values"
    with pytest.raises(ConfigError, match=message):
        list_combinations([HEAD, RATE])


def test_random_trials_cover_the_search_space() -> None:
    trials = draw_random_trials([RATE, RANK, HEAD], seed="1", number=200)
    rates = sorted(float(trial["training.learning_rate"]) for trial in trials)
    assert 0.001 <= rates[0] < 0.0015
    assert 0.07 < rates[-1] <= 0.1
    assert math.log10(rates[100]) == pytest.approx(-2, abs=0.3), "half of them are below the middle by logarithm"
    assert {trial["lora.rank"] for trial in trials} == {str(rank) for rank in range(2, 10)}
    assert {trial["lora"] for trial in trials} == {"attention", "all_linear"}
    narrow = SearchedSetting(key="x", low=0.12346, high=0.12354)
    values = {float(trial["x"]) for trial in draw_random_trials([narrow], seed="1", number=20)}
    assert all(0.12346 <= value <= 0.12354 for value in values), "rounded within their ends"


def test_each_random_trial_has_a_separate_seed() -> None:
    """Additional trials do not change earlier trials, and a trial does not reveal its index."""
    few, many = (draw_random_trials([RATE, RANK], seed="1", number=number) for number in (2, 5))
    assert many[:2] == few
    assert len({trial["training.learning_rate"] for trial in many}) == 5
    assert draw_random_trials([RATE, RANK], seed="2", number=2) != few


def propose_rates(seed: str = "3", *, peak: float = 0.01, number: int = 24) -> list[float]:
    """Return the proposed rates if the best rate is `peak`; every fifth trial has no score."""
    tpe, proposed = Tpe([RATE, HEAD], seed=seed, number=number), []
    for index in range(number):
        rate = float(tpe.ask()["training.learning_rate"])
        proposed.append(rate)
        tpe.tell(None if index % 5 == 4 else -abs(math.log(rate / peak)))
    return proposed


def test_tpe_concentrates_on_good_scores_reproducibly() -> None:
    proposed = propose_rates()
    assert proposed == propose_rates()
    assert proposed[:8] == propose_rates(peak=0.09)[:8], "a third is drawn before any score counts"
    distances = [abs(math.log(rate / 0.01)) for rate in proposed]
    assert sum(distances[8:]) / 16 < 0.7 * sum(distances[:8]) / 8
    assert proposed[8:] != propose_rates(peak=0.09)[8:]


def test_search_space_ends_are_enumerated(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [{"lora.rank": rank, "lora": lora} for rank in ("2", "9") for lora in ("attention", "all_linear")]
    assert combine_extreme_values([RANK, HEAD]) == ends
    monkeypatch.setattr(trial_search, "_MAX_ENDS", 3)
    assert combine_extreme_values([RANK, HEAD]) == [ends[0], ends[2], ends[1]], "one setting after the other"

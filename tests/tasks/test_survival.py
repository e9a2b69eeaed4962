"""Survival task: censored targets, manually computed scores, and a complete run."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune.data.records import Record
from fedtune.model.spec import LoraSpec, ModelSpec, TaskModelSpec
from fedtune.spec import ConfigError, DataError
from fedtune.tasks.registry import get_task
from fedtune.tasks.survival import concordance, count_observed_intervals, integrated_brier

from ..conftest import list_tiny_overrides, read_result, run_command
from ..data.conftest import make_data_spec

SURVIVAL = get_task("survival", {"intervals": [1.0, 2.0, 4.0]})
DATA = make_data_spec("text", "time", "event")
SPEC = TaskModelSpec(model=ModelSpec(path="random:bert"), lora=LoraSpec(), task="survival")


@pytest.mark.parametrize(
    ("time", "event", "expected"),
    [
        *(("0.5", "1", [1, -100, -100]), ("1.0", "true", [1, -100, -100]), ("1.5", "1", [0, 1, -100])),
        *(("4", "1", [0, 0, 1]), ("9", "1", [0, 0, 0]), ("0.5", "0", [-100, -100, -100]), ("1", "0", [0, -100, -100])),
        *(("3.9", "false", [0, 0, -100]), ("4", "0", [0, 0, 0])),
    ],
)
def test_survival_targets_follow_from_time_and_event(time: str, event: str, expected: list[int]) -> None:
    record = Record({"text": "a", "time": time, "event": event})
    assert list(SURVIVAL.target(DATA)(record)) == expected  # type: ignore[attr-defined]
    for invalid in ({"time": "-1"}, {"event": "maybe"}, {"event": "2"}):
        assert SURVIVAL.record_validator(DATA)(Record({**record.fields, **invalid})) is not None, (
            "a record without information must be refused"
        )


@pytest.mark.parametrize(
    "values", [("1", "2"), ("alive", "dead"), ("0:LIVING", "1:DECEASED"), ("FALSE", "TRUE"), ("0.0", "1.0")]
)
def test_event_column_accepts_declared_values(values: tuple[str, str]) -> None:
    data = make_data_spec("text", "time", "event", event_values=values)
    lost, came = (Record({"text": "a", "time": "1.5", "event": value}) for value in values)
    assert [SURVIVAL.target(data)(one).tolist() for one in (lost, came)] == [[0, -100, -100], [0, 1, -100]]  # type: ignore[attr-defined]
    assert SURVIVAL.record_validator(data)(Record({**lost.fields, "event": "3"})) is not None
    assert SURVIVAL.dummy_field("event", data, draw=lambda _: 1) == values[1]
    for bad in (("1",), ("1", "1.0"), ("true", "TRUE")):
        with pytest.raises(ConfigError, match=r"event_values = \[.*\]: must be two different values, or none"):
            make_data_spec(event_values=bad)


def test_survival_loss_uses_only_known_intervals() -> None:
    logits, targets = torch.tensor([[0.3, -1.2, 2.0]] * 2), torch.tensor([[0, 1, -100], [-100] * 3], dtype=torch.int8)
    chance = torch.sigmoid(logits[0])
    expected = -(torch.log(1 - chance[0]) + torch.log(chance[1])) / 3
    loss = SURVIVAL.loss(logits, targets, spec=SPEC)  # type: ignore[attr-defined]
    torch.testing.assert_close(loss, torch.stack([expected, torch.tensor(0.0)]))
    # The targets contain how long each person was followed.
    followed, event = count_observed_intervals(
        np.array([[1, -100], [0, 1], [0, -100], [0, 0], [-100, -100]], dtype=float)
    )
    assert (followed.tolist(), event.tolist()) == ([0, 1, 1, 2, 0], [True, True, False, False, False])


def test_concordance_counts_every_comparable_pair() -> None:
    # Events in intervals 1 and 2; one person lost after interval 1, one followed to the end.
    followed, event = np.array([0, 1, 1, 3]), np.array([True, True, False, False])
    # Pairs: the first with all three others; the second with the last (the lost person left in the second's interval).
    assert concordance(np.array([4.0, 3.0, 2.0, 1.0]), followed, event) == 1.0
    assert concordance(np.array([1.0, 3.0, 2.0, 0.0]), followed, event) == 2 / 4
    assert concordance(np.array([2.0, 3.0, 2.0, 2.0]), followed, event) == (0.0 + 0.5 + 0.5 + 1.0) / 4
    assert concordance(np.ones(2), np.array([3, 3]), np.array([False, False])) == 0.5
    draws = np.random.default_rng(3)
    for _ in range(20):
        risk, followed = draws.integers(0, 4, 12).astype(float), draws.integers(0, 4, 12)
        event = draws.random(12) < 0.5
        pairs = [
            (one, other) for one in np.flatnonzero(event) for other in range(12) if followed[other] > followed[one]
        ]
        right = [(risk[other] < risk[one]) + (risk[other] == risk[one]) / 2 for one, other in pairs]
        assert concordance(risk, followed, event) == pytest.approx(np.mean(right) if right else 0.5)


def test_integrated_brier_score_matches_a_manual_calculation() -> None:
    survival = np.array([[0.8, 0.4], [0.9, 0.5], [0.6, 0.2], [0.7, 0.6]])
    followed, event = np.array([0, 1, 1, 2]), np.array([True, False, True, False])
    # Of the two who can be lost in interval 2 (events come first), one is: half remain.
    first = (0.8**2 + 0.1**2 + 0.4**2 + 0.3**2) / 4
    second = (0.4**2 / 1.0 + 0.2**2 / 1.0 + 0.4**2 / 0.5) / 4
    assert integrated_brier(survival, followed, event) == pytest.approx((first + second) / 2)
    nobody_lost = np.array([True, True, True, False])
    other = (0.4**2 + 0.5**2 + 0.2**2 + 0.4**2) / 4
    assert integrated_brier(survival, followed, nobody_lost) == pytest.approx((first + other) / 2)
    # An interval that nobody completed has no score.
    survival = np.array([[0.8, 0.4], [0.9, 0.5], [0.6, 0.2]])
    followed, event = np.array([0, 1, 1]), np.array([True, False, False])
    first = (0.8**2 + 0.1**2 + 0.4**2) / 3
    assert integrated_brier(survival, followed, event) == pytest.approx(first)
    assert integrated_brier(1 - survival, np.zeros(3, int), np.ones(3, bool)) > 0, "every event is observed here"
    with pytest.raises(DataError, match="no interval with a known state at its end"):
        integrated_brier(survival, np.zeros(3, int), np.zeros(3, bool))


@pytest.mark.parametrize(
    "intervals",
    [
        *((2.0, 1.0), (0.0, 1.0), (1.0, 1.0), (-1.0, 5.0), (math.nan, 5.0), (5.0, math.nan), (1.0, math.inf)),
        tuple(map(float, range(1, 102))),
    ],
)
def test_intervals_must_ascend_and_cox_is_refused(intervals: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="intervals"):
        get_task("survival", {"intervals": intervals})
    with pytest.raises(ConfigError, match=r"task = 'cox': couples records: .*; use task=survival"):
        get_task("cox")


def test_survival_run_on_a_table_learns_scores_and_generates(tmp_path: Path) -> None:
    draws, file = np.random.default_rng(2), tmp_path / "followed.csv"
    with file.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["age", "months", "died"])
        for age in draws.uniform(20, 90, size=500):
            time, censored = draws.exponential(200 / (age - 10) ** 0.9 * 3), draws.exponential(30)
            table.writerow([f"{age:.1f}", f"{min(time, censored):.2f}", int(time <= censored)])
    rows = [
        *list_tiny_overrides("experiment=own_features", into=tmp_path, name="followed"),
        *("task=survival", f"data.train_file='{file}'", "data.columns={time: months, event: died}", "data.labels=[]"),
        *("data.features=[{columns: [age], range: [0, 110]}]", "task_settings.intervals=[5,10,20,40]"),
        *("data.max_length=1", "data.train_fraction=1", "data.test_fraction=0.4", "data.declared_sizes=75"),
        *("data.test_rows=null", "data.validation_rows=null"),
        *("privacy=none", "privacy.noise_multiplier=null", "training=adamw", "training.learning_rate=0.1"),
        *("federation.num_rounds=3", "training.local_steps=10", "runtime.seeded_noise=true"),
    ]
    assert run_command("simulate", *rows).printed
    final = read_result(tmp_path / "followed")["final"]
    assert list(final["metrics"]) == ["concordance", "integrated_brier", "loss"]
    assert final["metrics"]["concordance"] > 0.6 > 0.5 == final["metrics_before"]["concordance"]
    assert final["metrics"]["integrated_brier"] < final["metrics_before"]["integrated_brier"]
    (tmp_path / "asked.csv").write_text("age\n25\n85\n")
    out = run_command("generate", str(tmp_path / "followed"), "--file", str(tmp_path / "asked.csv"), "--json").printed
    young, old = (next(iter(json.loads(line)["answers"].values())) for line in out.splitlines())
    assert [record["until"] for record in old] == [5, 10, 20, 40]
    assert all(record["survival"] > second["survival"] for record, second in zip(young, old, strict=True))

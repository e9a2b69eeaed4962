"""Settings of training and of the machine, golden values of the schedule, and the optimizer's parameter groups."""

from typing import Any

import pytest
import torch

from fedtune.spec import ConfigError
from fedtune.training.optimizer import compute_learning_rate_factor, make_optimizer, set_learning_rate
from fedtune.training.spec import Machine, TrainingSpec, choose_learning_rate


def test_automatic_learning_rate_gives_all_schedules_the_same_path() -> None:
    constant, linear = (choose_learning_rate(steps=50, schedule=one, private=True) for one in ("constant", "linear"))
    assert constant == pytest.approx(0.2 / 50**0.5)
    spec = TrainingSpec(schedule="linear")
    path = sum(linear * compute_learning_rate_factor(spec, step=step, total_steps=50) for step in range(50))
    assert path == pytest.approx(50 * constant, rel=0.03)
    assert choose_learning_rate(steps=200, schedule="constant", private=True) == pytest.approx(constant / 2)
    assert choose_learning_rate(steps=50, schedule="linear", private=False) == pytest.approx(linear / 2)


@pytest.mark.parametrize("other", [{"optimizer": "sgd"}, {"head_learning_rate": 0.1}, {"unclipped_learning_rate": 0.1}])
def test_automatic_learning_rate_requires_plain_adam(other: dict[str, Any]) -> None:
    key = next(iter(other)).replace("optimizer", "learning_rate")
    with pytest.raises(ConfigError, match=rf"^{key} = "):
        TrainingSpec(learning_rate="auto", **other)


GOLDEN = [
    ("constant", 0, [1, 1, 1, 1, 1]),
    ("constant", 2, [0.5, 1, 1, 1, 1]),
    ("linear", 0, [1, 0.8, 0.6, 0.4, 0.2]),
    ("linear", 2, [0.5, 1, 1, 2 / 3, 1 / 3]),
    ("cosine", 0, [1, 0.904508, 0.654508, 0.345492, 0.095492]),
    ("cosine", 1, [1, 1, 0.853553, 0.5, 0.146447]),
    ("linear", 4, [0.25, 0.5, 0.75, 1]),  # a warmup as long as the run
]


@pytest.mark.parametrize(("schedule", "warmup", "golden"), GOLDEN)
def test_learning_rate_schedule_matches_golden_values(schedule: Any, warmup: int, golden: list[float]) -> None:
    spec = TrainingSpec(schedule=schedule, warmup_steps=warmup)
    last, end = float(schedule == "constant"), len(golden)
    factors = [
        compute_learning_rate_factor(spec, step=step, total_steps=end) for step in (*range(end), end + 1, end + 4)
    ]
    assert factors == pytest.approx([*golden, last, last], abs=1e-6)


def test_unclipped_run_uses_separate_learning_rates() -> None:
    recipe = TrainingSpec(learning_rate=0.3, head_learning_rate=0.6, unclipped_head_learning_rate=0.9)
    assert (recipe.compute_peak_rates(clipped=True), recipe.compute_peak_rates(clipped=False)) == (
        (0.3, 0.6),
        (0.3, 0.9),
    )
    assert recipe.suggest_lower_rates(clipped=True) == {"learning_rate": 0.1, "head_learning_rate": 0.2}
    assert recipe.suggest_lower_rates(clipped=False) == {"learning_rate": 0.1, "unclipped_head_learning_rate": 0.3}
    assert TrainingSpec(learning_rate=0.1, unclipped_learning_rate=0.3).compute_peak_rates(clipped=False) == (0.3, 0.3)
    assert TrainingSpec(learning_rate=0.3).suggest_lower_rates(clipped=True) == {"learning_rate": 0.1}


def test_lora_and_head_have_separate_learning_rates() -> None:
    parameters = {name: torch.nn.Parameter(torch.zeros(2)) for name in ("base.lora_A.weight", "head.weight")}
    optimizer = make_optimizer(parameters, TrainingSpec(learning_rate=0.1, head_learning_rate=0.5))
    set_learning_rate(optimizer, 0.5)
    set_learning_rate(optimizer, 0.2)  # a multiplier of the peak rate, not of the previous step's rate
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert [rates[id(p)] for p in parameters.values()] == pytest.approx([0.02, 0.1])
    common = make_optimizer(parameters, TrainingSpec(learning_rate=0.1))
    assert [group["lr"] for group in common.param_groups] == [0.1, 0.1], "the head must use the same rate by default"
    adamw = make_optimizer(parameters, TrainingSpec(weight_decay=0.3, betas=(0.5, 0.6)))
    assert isinstance(adamw, torch.optim.AdamW)
    assert {(group["weight_decay"], group["betas"]) for group in adamw.param_groups} == {(0.3, (0.5, 0.6))}
    sgd = make_optimizer(parameters, TrainingSpec(optimizer="sgd", weight_decay=0.3, momentum=0.7))
    assert isinstance(sgd, torch.optim.SGD)
    assert {(group["weight_decay"], group["momentum"]) for group in sgd.param_groups} == {(0.3, 0.7)}
    del parameters["head.weight"]
    assert len(make_optimizer(parameters, TrainingSpec()).param_groups) == 1, "without a head, one group"


@pytest.mark.parametrize(("key", "minimum"), [("num_devices", 1), ("num_threads", 0), ("step_mib", 0)])
def test_machine_sizes_below_their_minimum_are_refused(key: str, minimum: int) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} = {minimum - 1}: must be a whole number of at least {minimum}$"):
        Machine(**{key: minimum - 1})  # type: ignore[arg-type]

"""Forecasts of traffic and time; no test depends on measured durations."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.federation import forecast as forecast_module
from fedtune.federation.forecast import Forecast, forecast
from fedtune.model.adapter import Adapter
from fedtune.model.spec import LoraSpec, ModelSpec
from fedtune.privacy.run_plan import Plan
from fedtune.tasks.task_model import TaskModel, build_task_model
from fedtune.training import machine
from fedtune.training.spec import RuntimeSpec

from ..builders import build_copy
from ..conftest import run_plan
from ..model.conftest import make_spec

SIZES = {"a": 100, "b": 50}


def make_tiny_spec(task: str = "classification", *, layers: Any = None, dtype: Any = "float32") -> TaskModel:
    model = ModelSpec(path="random:bert" if task == "classification" else "random:llama", dtype=dtype)
    return build_copy(make_spec(task=task, model=model, lora=LoraSpec(rank=2, layers=layers)))


def forecast_plan(
    model: TaskModel, plan: Plan | None = None, runtime: RuntimeSpec | None = None, **changes: Any
) -> Forecast:
    fields = {"declared_sizes": SIZES, "max_length": 8, "runtime": runtime or RuntimeSpec(), "traffic": (700, 300)}
    fields |= {"ranks": dict.fromkeys(SIZES)}
    return forecast(plan or run_plan(), model, **fields | changes)


def test_forecast_traffic_covers_all_sites_and_rounds() -> None:
    model = make_tiny_spec()
    costs = forecast_plan(model)
    assert costs.values == sum(array.size for array in Adapter.from_task_model(model).tensors.values())
    assert costs.site_values == dict.fromkeys(SIZES, costs.values), "every site must train the whole adapter"
    smaller = forecast_plan(model, ranks=dict.fromkeys(SIZES, 1)).site_values
    assert all(0 < value < costs.values for value in smaller.values())
    assert costs.bytes_total == (costs.bytes_down + costs.bytes_up) * 2 * 3, "two sites, three rounds, no spare rounds"


def test_forecast_model_memory_follows_the_dtype() -> None:
    dtypes = ("float32", "bfloat16", "nf4")
    sizes = {dtype: forecast_plan(make_tiny_spec("causal_lm", dtype=dtype)).model_bytes for dtype in dtypes}
    adapter = 4 * sum(tensor.numel() for tensor in make_tiny_spec("causal_lm").trainable().values())
    assert sizes["float32"] - sizes["bfloat16"] == pytest.approx(sizes["bfloat16"] - adapter, rel=0.01)
    assert adapter < sizes["nf4"] < sizes["bfloat16"]


def test_forecast_times_follow_expected_batch_sizes() -> None:
    costs = forecast_plan(make_tiny_spec())
    assert costs.step_seconds["a"] == pytest.approx(2 * costs.step_seconds["b"])
    assert costs.round_seconds["a"] == pytest.approx(2 * costs.step_seconds["a"])
    steps = 3 * sum(costs.round_seconds.values())
    assert costs.seconds_one_after_another == pytest.approx(costs.first_seconds + steps)
    assert costs.step_seconds["a"] > 0
    assert forecast_plan(make_tiny_spec("causal_lm")).step_seconds["b"] > 0


def test_forecast_counts_all_permitted_records_of_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast_module, "measure_example_seconds", lambda *_, **__: (0.5, 2.0))
    user_plan = replace(run_plan(), unit="user", records_per_user=8)
    single, several = (forecast_plan(make_tiny_spec(), plan) for plan in (run_plan(), user_plan))
    assert several.step_seconds == {site: pytest.approx(8 * seconds) for site, seconds in single.step_seconds.items()}
    assert several.first_seconds == pytest.approx(8 * single.first_seconds)


def test_forecast_cost_grows_with_texts_per_record(monkeypatch: pytest.MonkeyPatch) -> None:
    batches, collate = list[Any](), machine.collate
    monkeypatch.setattr(machine, "collate", lambda *a, **kw: batches.append(collate(*a, **kw)) or batches[-1])
    spec = replace(make_tiny_spec(layers=(-1,)).spec, task="embedding", labels=(), texts=3)
    model = build_task_model(spec)
    width = model.base.config.hidden_size * 4
    records = sum(SIZES.values()) * run_plan().records_per_user
    for texts, cached in ((3, True), (2, False)):
        setup = RuntimeSpec(kept_states_mib=records * 8 * texts * width / 2**20, micro_batch_tokens=1024)
        costs = forecast_plan(model, runtime=setup)
        assert costs.frozen_states_kept == cached
    assert tuple(batches[0].input_ids.shape) == (512 // 24 * 3, 8)


def test_forecast_runs_cached_frozen_layers_once_per_record(tmp_path: Path) -> None:
    digest = Adapter.from_task_model(model := make_tiny_spec(layers=(-1,))).digest()
    cached = forecast_plan(model)
    assert cached.frozen_states_kept
    assert cached.first_seconds > 0
    no_cache = replace(RuntimeSpec(), kept_states_mib=0)
    uncached = forecast_plan(model, runtime=no_cache)
    assert not uncached.frozen_states_kept
    assert uncached.first_seconds == 0
    on_disk = replace(no_cache, kept_states_folder=str(tmp_path))
    assert forecast_plan(model, runtime=on_disk).frozen_states_kept
    assert Adapter.from_task_model(model).digest() == digest, "a timing pass must not change the model"
    assert all(parameter.grad is None for parameter in model.parameters())

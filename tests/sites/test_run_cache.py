"""A simulated run passes on only what the next run would recompute identically, and only on request."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

import fedtune
import fedtune.sites.shared_model as shared_model
from fedtune.api.compose import compose_run
from fedtune.sites.run_cache import RunCache
from fedtune.tasks.task_model import TaskModel
from fedtune.training.examples import SiteExamples

from ..conftest import list_tiny_overrides, read_adapter_files, read_result

pytestmark = pytest.mark.filterwarnings("ignore:data.declared_sizes differs greatly from")
SEEDED = ("runtime.seeded_noise=true", "lora.layers=[1]", "lora.rank=2")
"""The first of two layers is frozen, and its outputs for records are cached."""


def simulate(*overrides: str, into: Path, name: str, cache: RunCache | None = None) -> Path:
    """Run the tiny federation to its end, with or without a cache, and return its folder."""
    return fedtune.simulate(
        compose_run(list_tiny_overrides(*SEEDED, *overrides, into=into, name=name)), cache=cache
    ).folder


@pytest.fixture
def work_counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count how often a model is built and tried, the frozen layer runs over records, and data is scored."""
    counts = dict.fromkeys(("built", "tried", "states", "scored"), 0)
    for name, function in {
        "built": "build_task_model",
        "tried": "max_batch_influence",
        "scored": "evaluate_examples",
    }.items():
        real = getattr(shared_model, function)

        def count_call(*args: Any, name: str = name, real: Any = real, **rest: Any) -> Any:
            counts[name] += 1
            return real(*args, **rest)

        monkeypatch.setattr(shared_model, function, count_call)
    keep = SiteExamples.cache_frozen_states

    def count_kept_states(self: SiteExamples, model: TaskModel, **rest: Any) -> None:
        counts["states"] += self._states is None and "parts" not in rest
        keep(self, model, **rest)

    monkeypatch.setattr(SiteExamples, "cache_frozen_states", count_kept_states)
    monkeypatch.setattr(shared_model, "_measured", {})
    return counts


def simulate_runs(into: Path, *variants: tuple[str, ...], cache: RunCache | None = None) -> list[Path]:
    return [simulate(*more, into=into, name=f"run-{n}", cache=cache) for n, more in enumerate(variants)]


@pytest.mark.nightly
def test_sweep_runs_sharing_a_session_match_separate_runs(tmp_path: Path, work_counts: dict[str, int]) -> None:
    variants = (
        *((), ("training.learning_rate=0.5",), ("federation.participants=[site-2]",)),
        ("privacy.noise_multiplier=6.0", "federation.num_rounds=1"),
    )
    separate = simulate_runs(tmp_path / "alone", *variants)
    assert (work_counts["built"], work_counts["states"]) == (4, 7)
    work_counts.update(dict.fromkeys(work_counts, 0))
    shared_model._measured.clear()
    with RunCache() as cache:
        cached = simulate_runs(tmp_path / "together", *variants, cache=cache)
    # One model, tried once; records of two sites; scores before training, and per run after each round and at the end.
    assert work_counts == {"built": 1, "tried": 1, "states": 2, "scored": 1 + (2 + 1) * 3 + (1 + 1)}
    for expected, actual in zip(separate, cached, strict=True):
        assert read_adapter_files(expected) == read_adapter_files(actual)
        was, now = read_result(expected), read_result(actual)
        assert [entry["metrics"] for entry in was["rounds"]] == [entry["metrics"] for entry in now["rounds"]]
        assert was["privacy"]["sites"] == now["privacy"]["sites"]
        for scores in ("metrics", "metrics_before"):
            assert was["final"][scores] == now["final"][scores]


@pytest.mark.by_day("privacy.max_grad_norm=0.5-1-None")
@pytest.mark.parametrize(
    ("actual", "built", "expected_work"),
    [
        # Another model or other shapes,
        *((other, 1, None) for other in ("lora.rank=3", "seed=1", "data.max_length=12", "privacy.max_grad_norm=0.5")),
        ("runtime.micro_batch_tokens=64", 1, None),
        # and other records, with how often states are cached and scores computed.
        *(
            ("data.train_fraction=0.03", 0, (2, 3)),
            ("data.test_rows=9", 0, (0, 4)),
            ("evaluation.max_tokens=64", 0, (0, 4)),
        ),
    ],
)
def test_session_rebuilds_only_changed_parts(
    tmp_path: Path, work_counts: Any, actual: str, built: int, expected_work: Any
) -> None:
    (separate,) = simulate_runs(tmp_path / "alone", (actual,))
    with RunCache() as cache:
        simulate_runs(tmp_path / "together", (), cache=cache)
        before = dict(work_counts)
        cached = simulate(actual, into=tmp_path / "together", name="other", cache=cache)
    assert work_counts["built"] == before["built"] + built
    assert expected_work in (None, (work_counts["states"] - before["states"], work_counts["scored"] - before["scored"]))
    assert read_adapter_files(separate) == read_adapter_files(cached)
    assert read_result(separate)["final"]["metrics"] == read_result(cached)["final"]["metrics"]


def list_kept_examples(cache: RunCache) -> list[Any]:
    return [examples for key, examples in cache._states.items() if key.startswith("examples")]


@pytest.mark.nightly
def test_session_cache_is_limited_by_memory(tmp_path: Path, work_counts: dict[str, int]) -> None:
    """Sites declare 90 records of 16 tokens and 32 values: 0.35 MiB in total. Twice as many exceed 0.4 MiB."""
    room = "runtime.kept_states_mib=1"
    with RunCache() as cache:
        simulate_runs(tmp_path, (room,), cache=cache)
        assert len(list_kept_examples(cache)) == 2
        cache._num_tokens = 2**20 // (32 * 4)  # as after many other records
        simulate(room, "data.train_fraction=0.03", into=tmp_path, name="other", cache=cache)
        assert len(list_kept_examples(cache)) == 2, "earlier entries must be evicted"
    assert work_counts["states"] == 4


@pytest.mark.nightly
def test_states_cached_on_disk_produce_the_same_run(tmp_path: Path, work_counts: dict[str, int]) -> None:
    (tmp_path / "fast").mkdir()
    folder = f"runtime.kept_states_folder='{tmp_path / 'fast'}'"
    in_memory, on_disk = simulate_runs(tmp_path, (), ("runtime.kept_states_mib=0", folder))
    assert read_adapter_files(in_memory) == read_adapter_files(on_disk)
    assert work_counts["states"] == 4
    assert list((tmp_path / "fast").iterdir()) == []


@pytest.mark.nightly
def test_session_releases_all_state_on_exit(tmp_path: Path) -> None:
    with RunCache() as cache:
        simulate_runs(tmp_path, (), cache=cache)
        assert cache.model is not None
        examples = weakref.ref(list_kept_examples(cache)[0])
    assert cache.model is None
    assert not cache._states
    gc.collect()
    assert examples() is None

"""What a simulated run leaves to the next one: only what that would compute itself, and only where it is asked to."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedtune
import fedtune.sites.shared_model as shared_model
from fedtune.api.compose import compose_run
from fedtune.sites.session import Session
from fedtune.tasks import TaskModel
from fedtune.training.examples import SiteExamples

pytestmark = pytest.mark.filterwarnings("ignore:data.declared_sizes is far from")
Simulate = Callable[..., Path]
SEEDED = ("runtime.seeded_noise=true", "lora.layers=[1]", "lora.rank=2")
"""Of two layers the first is frozen, and what it makes of records is kept."""


@pytest.fixture
def simulate(tiny: Callable[..., list[str]]) -> Simulate:
    """Run the tiny federation to its end, in a session or alone, and return its folder."""

    def run(*overrides: str, into: Path, name: str, session: Session | None = None) -> Path:
        return fedtune.simulate(compose_run(tiny(*overrides, into=into, name=name)), session=session).folder

    return run


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a model was built and tried, the frozen layer ran over records, and data was scored."""
    counts = dict.fromkeys(("built", "tried", "states", "scored"), 0)

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **rest: Any) -> Any:
            counts[name] += 1
            return function(*args, **rest)

        return counted

    monkeypatch.setattr(shared_model, "build_task_model", counting("built", shared_model.build_task_model))
    monkeypatch.setattr(shared_model, "moved_by_others", counting("tried", shared_model.moved_by_others))
    monkeypatch.setattr(shared_model, "figures_of", counting("scored", shared_model.figures_of))
    keep = SiteExamples.keep_frozen_states

    def kept(self: SiteExamples, model: TaskModel, **rest: Any) -> None:
        counts["states"] += self._states is None and "parts" not in rest
        keep(self, model, **rest)

    monkeypatch.setattr(SiteExamples, "keep_frozen_states", kept)
    monkeypatch.setattr(shared_model, "_measured", {})
    return counts


def runs(simulate: Simulate, into: Path, *variants: tuple[str, ...], session: Session | None = None) -> list[Path]:
    return [simulate(*SEEDED, *more, into=into, name=f"run-{n}", session=session) for n, more in enumerate(variants)]


def test_runs_that_hand_on_come_to_what_each_comes_to_alone(
    simulate: Simulate, tmp_path: Path, result_of: Any, adapter_of: Any, worked: dict[str, int]
) -> None:
    variants = (
        (),
        ("training.learning_rate=0.5",),
        ("federation.participants=[site-2]",),
        ("privacy.noise_multiplier=6.0", "federation.num_rounds=1"),
    )
    alone = runs(simulate, tmp_path / "alone", *variants)
    assert (worked["built"], worked["states"]) == (4, 7)
    worked.update(dict.fromkeys(worked, 0))
    shared_model._measured.clear()
    with Session() as session:
        together = runs(simulate, tmp_path / "together", *variants, session=session)
    # One model, tried once; two sites' records; before training once, and of each run its rounds and its end.
    assert worked == {"built": 1, "tried": 1, "states": 2, "scored": 1 + (2 + 1) * 3 + (1 + 1)}
    for one, other in zip(alone, together, strict=True):
        assert adapter_of(one) == adapter_of(other)
        was, now = result_of(one), result_of(other)
        assert [entry["metrics"] for entry in was["rounds"]] == [entry["metrics"] for entry in now["rounds"]]
        assert was["privacy"]["sites"] == now["privacy"]["sites"]
        for scores in ("metrics", "metrics_before"):
            assert was["final"][scores] == now["final"][scores]


@pytest.mark.by_day("privacy.max_grad_norm=0.5")
@pytest.mark.parametrize(
    "other",
    ["lora.rank=3", "seed=1", "data.max_length=12", "privacy.max_grad_norm=0.5", "runtime.micro_batch_tokens=64"],
)
def test_another_model_or_other_shapes_are_made_anew(
    simulate: Simulate, tmp_path: Path, adapter_of: Any, worked: dict[str, int], other: str
) -> None:
    (alone,) = runs(simulate, tmp_path / "alone", (other,))
    with Session() as session:
        runs(simulate, tmp_path / "together", (), session=session)
        before = worked["built"]
        together = simulate(*SEEDED, other, into=tmp_path / "together", name="other", session=session)
    assert worked["built"] == before + 1
    assert adapter_of(alone) == adapter_of(together)


@pytest.mark.by_day("data.train_fraction=0.03")
@pytest.mark.parametrize("other", ["data.train_fraction=0.03", "data.test_rows=9", "evaluation.max_tokens=64"])
def test_other_records_are_read_run_and_scored_anew(
    simulate: Simulate, tmp_path: Path, result_of: Any, adapter_of: Any, worked: dict[str, int], other: str
) -> None:
    (alone,) = runs(simulate, tmp_path / "alone", (other,))
    with Session() as session:
        runs(simulate, tmp_path / "together", (), session=session)
        before = dict(worked)
        together = simulate(*SEEDED, other, into=tmp_path / "together", name="other", session=session)
    assert worked["built"] == before["built"]
    anew = {"data.train_fraction=0.03": (2, 3), "data.test_rows=9": (0, 4), "evaluation.max_tokens=64": (0, 4)}[other]
    assert (worked["states"] - before["states"], worked["scored"] - before["scored"]) == anew
    assert adapter_of(alone) == adapter_of(together)
    assert result_of(alone)["final"]["metrics"] == result_of(together)["final"]["metrics"]


def test_no_more_is_handed_on_than_fits(simulate: Simulate, tmp_path: Path, worked: dict[str, int]) -> None:
    """Sites declare 90 records of 16 tokens and 32 numbers: 0.35 MiB for both.  Twice as many do not fit 0.4."""
    room = "runtime.kept_states_mib=1"
    with Session() as session:
        runs(simulate, tmp_path, (room,), session=session)
        assert len(session._examples) == 2
        session._num_tokens = 2**20 // (32 * 4)  # as after many other records
        simulate(*SEEDED, room, "data.train_fraction=0.03", into=tmp_path, name="other", session=session)
        assert len(session._examples) == 2, "the earlier ones went"
    assert worked["states"] == 4


def test_states_on_disk_come_to_the_same_run(
    simulate: Simulate, tmp_path: Path, adapter_of: Any, worked: dict[str, int]
) -> None:
    (tmp_path / "fast").mkdir()
    folder = f"runtime.kept_states_folder='{tmp_path / 'fast'}'"
    in_memory, on_disk = runs(simulate, tmp_path, (), ("runtime.kept_states_mib=0", folder))
    assert adapter_of(in_memory) == adapter_of(on_disk)
    assert worked["states"] == 4
    assert list((tmp_path / "fast").iterdir()) == []


def test_nothing_is_left_when_the_runs_are_over(simulate: Simulate, tmp_path: Path) -> None:
    with Session() as session:
        runs(simulate, tmp_path, (), session=session)
        assert session.model is not None
        examples = weakref.ref(next(iter(session._examples.values())))
    assert session.model is None
    assert not session._examples
    gc.collect()
    assert examples() is None

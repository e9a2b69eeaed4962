"""What a simulated run leaves to the next one: only what that would compute itself, and only where it is asked to."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

import fedtune
import fedtune.sites.shared_model as shared_model
from fedtune.api.compose import compose_run
from fedtune.sites.session import Session
from fedtune.tasks.task_model import TaskModel
from fedtune.training.examples import SiteExamples

from ..conftest import adapter_of, result_of, tiny

pytestmark = pytest.mark.filterwarnings("ignore:data.declared_sizes is far from")
SEEDED = ("runtime.seeded_noise=true", "lora.layers=[1]", "lora.rank=2")
"""Of two layers the first is frozen, and what it makes of records is kept."""


def simulate(*overrides: str, into: Path, name: str, session: Session | None = None) -> Path:
    """Run the tiny federation to its end, in a session or alone, and return its folder."""
    return fedtune.simulate(compose_run(tiny(*SEEDED, *overrides, into=into, name=name)), session=session).folder


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a model was built and tried, the frozen layer ran over records, and data was scored."""
    counts = dict.fromkeys(("built", "tried", "states", "scored"), 0)
    for name, function in {
        "built": "build_task_model",
        "tried": "max_batch_influence",
        "scored": "evaluate_examples",
    }.items():
        real = getattr(shared_model, function)

        def counted(*args: Any, name: str = name, real: Any = real, **rest: Any) -> Any:
            counts[name] += 1
            return real(*args, **rest)

        monkeypatch.setattr(shared_model, function, counted)
    keep = SiteExamples.keep_frozen_states

    def kept(self: SiteExamples, model: TaskModel, **rest: Any) -> None:
        counts["states"] += self._states is None and "parts" not in rest
        keep(self, model, **rest)

    monkeypatch.setattr(SiteExamples, "keep_frozen_states", kept)
    monkeypatch.setattr(shared_model, "_measured", {})
    return counts


def runs(into: Path, *variants: tuple[str, ...], session: Session | None = None) -> list[Path]:
    return [simulate(*more, into=into, name=f"run-{n}", session=session) for n, more in enumerate(variants)]


def test_sweep_runs_sharing_a_session_match_separate_runs(tmp_path: Path, worked: dict[str, int]) -> None:
    variants = (
        *((), ("training.learning_rate=0.5",), ("federation.participants=[site-2]",)),
        ("privacy.noise_multiplier=6.0", "federation.num_rounds=1"),
    )
    alone = runs(tmp_path / "alone", *variants)
    assert (worked["built"], worked["states"]) == (4, 7)
    worked.update(dict.fromkeys(worked, 0))
    shared_model._measured.clear()
    with Session() as session:
        together = runs(tmp_path / "together", *variants, session=session)
    # One model, tried once; two sites' records; before training once, and of each run its rounds and its end.
    assert worked == {"built": 1, "tried": 1, "states": 2, "scored": 1 + (2 + 1) * 3 + (1 + 1)}
    for one, other in zip(alone, together, strict=True):
        assert adapter_of(one) == adapter_of(other)
        was, now = result_of(one), result_of(other)
        assert [entry["metrics"] for entry in was["rounds"]] == [entry["metrics"] for entry in now["rounds"]]
        assert was["privacy"]["sites"] == now["privacy"]["sites"]
        for scores in ("metrics", "metrics_before"):
            assert was["final"][scores] == now["final"][scores]


@pytest.mark.by_day("privacy.max_grad_norm=0.5-1-None", "data.train_fraction=0.03-0-anew5")
@pytest.mark.parametrize(
    ("other", "built", "anew"),
    [
        # Another model or other shapes,
        *((other, 1, None) for other in ("lora.rank=3", "seed=1", "data.max_length=12", "privacy.max_grad_norm=0.5")),
        ("runtime.micro_batch_tokens=64", 1, None),
        # and other records, with how often states are kept and scores computed.
        *(
            ("data.train_fraction=0.03", 0, (2, 3)),
            ("data.test_rows=9", 0, (0, 4)),
            ("evaluation.max_tokens=64", 0, (0, 4)),
        ),
    ],
)
def test_session_rebuilds_only_changed_parts(tmp_path: Path, worked: Any, other: str, built: int, anew: Any) -> None:
    (alone,) = runs(tmp_path / "alone", (other,))
    with Session() as session:
        runs(tmp_path / "together", (), session=session)
        before = dict(worked)
        together = simulate(other, into=tmp_path / "together", name="other", session=session)
    assert worked["built"] == before["built"] + built
    assert anew in (None, (worked["states"] - before["states"], worked["scored"] - before["scored"]))
    assert adapter_of(alone) == adapter_of(together)
    assert result_of(alone)["final"]["metrics"] == result_of(together)["final"]["metrics"]


def examples_in(session: Session) -> list[Any]:
    return [kept for about, kept in session._states.items() if about.startswith("examples")]


def test_session_cache_is_limited_by_memory(tmp_path: Path, worked: dict[str, int]) -> None:
    """Sites declare 90 records of 16 tokens and 32 numbers: 0.35 MiB for both.  Twice as many do not fit 0.4."""
    room = "runtime.kept_states_mib=1"
    with Session() as session:
        runs(tmp_path, (room,), session=session)
        assert len(examples_in(session)) == 2
        session._num_tokens = 2**20 // (32 * 4)  # as after many other records
        simulate(room, "data.train_fraction=0.03", into=tmp_path, name="other", session=session)
        assert len(examples_in(session)) == 2, "the earlier ones went"
    assert worked["states"] == 4


def test_states_cached_on_disk_give_the_same_run(tmp_path: Path, worked: dict[str, int]) -> None:
    (tmp_path / "fast").mkdir()
    folder = f"runtime.kept_states_folder='{tmp_path / 'fast'}'"
    in_memory, on_disk = runs(tmp_path, (), ("runtime.kept_states_mib=0", folder))
    assert adapter_of(in_memory) == adapter_of(on_disk)
    assert worked["states"] == 4
    assert list((tmp_path / "fast").iterdir()) == []


def test_session_releases_everything_at_its_end(tmp_path: Path) -> None:
    with Session() as session:
        runs(tmp_path, (), session=session)
        assert session.model is not None
        examples = weakref.ref(examples_in(session)[0])
    assert session.model is None
    assert not session._states
    gc.collect()
    assert examples() is None

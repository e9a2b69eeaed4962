"""Memory of a step: limited in bytes, measured with dummy examples, and without effect on results."""

from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from fedtune.data import MicroBatch, Shapes, TextDataset
from fedtune.model.adapter import Adapter
from fedtune.privacy.randomness import SeededRandomness
from fedtune.spec import ConfigError
from fedtune.tasks.task_model import TaskModel
from fedtune.training import machine, per_example
from fedtune.training.batch_invariance import fit_to_memory
from fedtune.training.dp_step import add_clipped, make_zero_sums
from fedtune.training.examples import SiteExamples
from fedtune.training.local import train_round
from fedtune.training.machine import compute_step_bytes, measure_peak_bytes
from fedtune.training.per_example import PerExampleGradients, record_gradients
from fedtune.training.spec import RuntimeSpec, TrainingSpec
from fedtune.training.users import UserExamples

from .conftest import build_fresh, build_trained, make_dummy_examples, make_plan, make_work

pytestmark = pytest.mark.nightly

CPU = torch.device("cpu")
SHAPES = Shapes.from_limits(max_length=20, max_tokens=400)
KINDS = [("random:bert", "classification"), ("random:llama", "causal_lm"), ("random:llama", "preference")]
kinds = pytest.mark.parametrize(("path", "task"), KINDS)
MIB = 2**20


def fit_within(model: TaskModel, num_bytes: float) -> Shapes:
    return fit_to_memory(model, SHAPES, most_bytes=int(num_bytes), keeps_states=model.has_frozen_prefix)


def list_rows(shapes: Shapes) -> list[int]:
    return [shapes.rows(length)[0] for length in shapes.lengths]


def make_dataset(model: TaskModel, length: int, count: int) -> TextDataset:
    draws = np.random.default_rng(3)
    ids = model.generate_dummies([length - 1] * (count * model.spec.texts), draws)
    targets = model.task.dummy_targets(ids, spec=model.spec, draws=draws, first=lambda length: 0)
    return TextDataset(ids, targets, model.spec.texts)


def measure_step(model: TaskModel, shapes: Shapes, dataset: TextDataset, part: MicroBatch) -> int:
    """Measure the bytes of a micro-batch in a step, from the first frozen layer to the sum."""
    examples = SiteExamples(dataset, pad_id=0, shapes=shapes, device="cpu")

    def take_step() -> None:
        if model.has_frozen_prefix:
            examples.cache_frozen_states(model, parts=[part])
        examples.cache_reference(model, parts=[part])
        with record_gradients(model) as gradients:
            add_clipped(make_zero_sums(model.trainable()), gradients.compute_gradients(examples.batch(part)), 1.0)

    return measure_peak_bytes(take_step, CPU)


def test_peak_memory_counts_live_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate_tensors() -> None:
        for _ in range(5):
            torch.zeros(MIB // 4)
        live = torch.zeros(MIB // 2)  # 2 MiB
        view = live[5:].view(-1)
        view.add_(1.0)
        del live
        torch.zeros(MIB // 4)

    before = torch.zeros(MIB)
    assert (
        measure_peak_bytes(allocate_tensors, CPU)
        == measure_peak_bytes(lambda: [allocate_tensors() for _ in range(3)], CPU)
        == 3 * MIB
    )
    assert measure_peak_bytes(lambda: before.add_(1.0), CPU) == 0, "tensors from before must not count"
    # A GPU's allocator reports the peak.
    of_gpu = {
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 700,
        "max_memory_allocated": 1000,
    }
    for name, value in of_gpu.items():
        monkeypatch.setattr(torch.accelerator, name, Mock(return_value=value))
    assert measure_peak_bytes(lambda: None, torch.device("cuda")) == 300


def test_default_step_memory_is_a_share_excluding_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/meminfo": "MemTotal:       16 kB\nMemFree: 3 kB\n", "/sys/fs/cgroup/memory.max": "9000\n"}
    with monkeypatch.context() as patched:
        patched.setattr(machine.Path, "read_text", lambda path: files[str(path)])
        assert machine._measure_memory_bytes() == 9000, "a container's limit must count"
        files["/sys/fs/cgroup/memory.max"] = "max\n"
        assert machine._measure_memory_bytes() == 16 * 1024
    model = build_fresh()
    of_model = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    monkeypatch.setattr(machine, "_measure_memory_bytes", lambda: 8 * 2**30)
    assert compute_step_bytes(model, RuntimeSpec()) == (8 * 2**30 - of_model) // 4
    assert compute_step_bytes(model, RuntimeSpec(num_devices=2)) == (4 * 2**30 - of_model) // 4
    assert compute_step_bytes(model, RuntimeSpec(step_mib=77)) == 77 * MIB
    monkeypatch.setattr(machine, "get_total_memory", lambda device: 24 * 2**30)
    monkeypatch.setattr(TaskModel, "device", torch.device("cuda"))
    assert compute_step_bytes(model, RuntimeSpec()) == int(0.4 * (24 * 2**30 - of_model))
    shared = RuntimeSpec(kind="ray", sites_per_gpu=3)
    assert compute_step_bytes(model, shared) == int(0.4 * (8 * 2**30 - of_model)), (
        "sites on one GPU must share its memory"
    )


@kinds
def test_every_micro_batch_stays_within_step_memory(path: str, task: str) -> None:
    model = build_fresh(path, task)
    unlimited = fit_within(model, 1e12)
    assert list_rows(unlimited) == list_rows(SHAPES), "with enough memory, only the token limit counts"
    peak = max(measure_step(model, SHAPES, *make_full_part(model, SHAPES, length)) for length in SHAPES.lengths)
    for share in (2, 5):
        less = fit_within(model, peak / share)
        assert sum(list_rows(less)) < sum(list_rows(unlimited))
        for length in less.lengths:
            dataset, part = make_full_part(model, less, length)
            assert measure_step(model, less, dataset, part) <= peak / share, (share, length)


def make_full_part(model: TaskModel, shapes: Shapes, length: int) -> tuple[TextDataset, MicroBatch]:
    rows = shapes.rows(length)[0]
    return make_dataset(model, length, rows), MicroBatch(np.arange(rows), rows, length)


@kinds
def test_failed_record_needs_no_extra_memory(path: str, task: str, monkeypatch: Any) -> None:
    model = build_fresh(path, task)
    # The smallest memory in which the largest micro-batch should fit.
    length = SHAPES.lengths[-1]
    one_length = replace(SHAPES, lengths=(length,))
    too_few, needed = MIB // 2, 10 * MIB
    while needed > 1.01 * too_few:
        middle = (needed + too_few) // 2
        fits = list_rows(fit_to_memory(model, one_length, most_bytes=middle, keeps_states=False)) == list_rows(
            one_length
        )
        too_few, needed = (too_few, middle) if fits else (middle, needed)
    dataset, part = make_full_part(model, SHAPES, length)
    ordinary = measure_step(model, SHAPES, dataset, part)
    compute_all_gradients, calls = PerExampleGradients.compute_all_gradients, []

    def fail_first(self: PerExampleGradients, batch: Any) -> Any:
        calls.append(len(batch))
        if len(calls) == 1:
            raise RuntimeError("a record that nobody can compute")
        gradients_seen = compute_all_gradients(self, batch)
        if len(calls) == 3:
            next(iter(gradients_seen.values()))[0] = torch.nan
        return gradients_seen

    monkeypatch.setattr(PerExampleGradients, "compute_all_gradients", fail_first)
    # pytest's log capture would keep the exception's frames, and with them all tensors.
    monkeypatch.setattr(per_example.log, "exception", lambda *_: None)
    with_failure = measure_step(model, SHAPES, dataset, part)
    assert len(calls) > 3
    assert ordinary < with_failure <= needed


def test_insufficient_step_memory_error_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_fresh()
    with pytest.raises(
        ConfigError, match=r"step_mib = 0: must be at least \d+ MiB, the memory for a micro-batch of 1 x 12 tokens"
    ):
        fit_within(model, 1000)
    minimum = fit_within(
        model, 1.5 * measure_step(model, SHAPES, make_dataset(model, 24, 1), MicroBatch(np.arange(1), 1, 24))
    )
    assert min(list_rows(minimum)) >= 1
    full = replace(SHAPES, full=SHAPES.lengths[-1])  # a length without padding keeps its empty row
    with_room = fit_to_memory(build_fresh(), full, most_bytes=MIB // 2, keeps_states=False)
    assert with_room.rows(full.full)[-1] == 2
    assert with_room.capacity(full.full, 2) == 1
    for error, text in ((RuntimeError, r"model\.path .* 24 tokens"), (torch.OutOfMemoryError, "micro_batch_tokens = ")):
        monkeypatch.setattr(TaskModel, "losses", Mock(side_effect=error("no such")))
        with pytest.raises(ConfigError, match=text):
            fit_within(model, 1e9)


@pytest.mark.parametrize("unit", ["record", "user"])
@pytest.mark.parametrize(("path", "task"), KINDS[:2])
def test_step_memory_does_not_change_the_round_result(path: str, task: str, unit: str) -> None:
    model, dataset = build_trained(path, task), make_dummy_examples(task, 40)
    start = Adapter.from_task_model(model)
    planned = make_plan(unit=unit, sampling_rate=0.7, noise_multiplier=0.5)
    work = make_work(plan=planned, training=TrainingSpec(), declared_size=30)
    rows, released = set(), set()
    for num_bytes, most_users in ((1e12, 40), (MIB, 3), (MIB // 2, 1)):
        shapes = fit_within(model, num_bytes)
        units: Any = SiteExamples(dataset, pad_id=0, shapes=shapes, device="cpu")
        if unit == "user":
            units = UserExamples(
                units, [np.arange(u, 40, 11) for u in range(11)], most_records=2, most_users=most_users
            )
        rows.add(tuple(list_rows(shapes)))
        released.add(train_round(model, start, units, work, randomness=SeededRandomness(5))[0].digest())
    assert len(rows) == 3
    assert len(released) == 1

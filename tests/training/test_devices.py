"""Training on several devices, as real processes: bit-identical results, and errors if a device fails."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.data import Shapes
from fedtune.model.adapter import Adapter
from fedtune.model.spec import TaskModelSpec
from fedtune.spec import ConfigError, RunError
from fedtune.tasks.task_model import TaskModel, build_task_model
from fedtune.training import devices as devices_module
from fedtune.training import machine
from fedtune.training.devices import Devices, DeviceTrial, DividedUnits, _Device, choose_run_devices
from fedtune.training.examples import SiteExamples, assign_device
from fedtune.training.machine import prepare_model
from fedtune.training.spec import RuntimeSpec
from fedtune.training.users import UserExamples

from ..forked import Forked
from ..model.conftest import make_spec
from .conftest import LAST, make_dummy_examples, make_work, release_round

REPOSITORY = Path(__file__).parents[2]
SHAPES = Shapes.from_limits(max_length=15, max_tokens=40)
MAX_GRAD_NORM = 0.5
KINDS = {
    "cached states": make_spec(lora=replace(LAST, alternate=True)),
    "a reference": make_spec("random:llama", "preference", texts=2),
}


@dataclass
class Room:
    model: TaskModel
    devices: Devices

    @property
    def pids(self) -> list[int]:
        return [int(process.pid or 0) for process, _ in self.devices.prepare_workers()._members]


def start_devices(spec: TaskModelSpec, count: int, *, other_spec: TaskModelSpec | None = None) -> Room:
    runtime = RuntimeSpec(device="cpu", num_devices=count, num_threads=1)
    model = prepare_model(lambda: build_task_model(spec), runtime, max_length=15)
    trial = DeviceTrial(
        shapes=SHAPES, keeps_states=model.has_frozen_prefix, max_grad_norm=MAX_GRAD_NORM, pad_id=0, weights_chosen=True
    )
    devices = Devices(model, other_spec or spec, runtime, max_length=15)
    devices.start_trials(trial, trial.run_trial(model, 7))
    devices.prepare_workers()
    return Room(model, devices)


@pytest.fixture(scope="module", autouse=True)
def fork_from_one_import() -> Iterator[None]:
    """Fork the device processes from a server that has imported torch, instead of importing torch in each process.

    Tests that kill the parent process, below and in tests/sites/test_work.py, spawn processes as usual.
    """
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload([devices_module.__name__, "transformers.models.bert.modeling_bert"])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(devices_module, "multiprocessing", SimpleNamespace(get_context=lambda _: forking))
        yield


@pytest.fixture(scope="module")
def rooms() -> Iterator[dict[str, Room]]:
    """Rooms with two and three devices, shared by the tests."""
    setups = {kind: start_devices(KINDS[kind], count) for kind, count in (("cached states", 3), ("a reference", 2))}
    yield setups
    for setup in setups.values():
        setup.devices._workers.end()


@pytest.fixture(params=KINDS)
def room(rooms: dict[str, Room], request: pytest.FixtureRequest) -> Room:
    return rooms[request.param]


@pytest.fixture
def three_devices(rooms: dict[str, Room]) -> Room:
    return rooms["cached states"]


def make_units(spec: TaskModelSpec, count: int, unit: str = "record", *, seed: int = 8) -> Any:
    examples = SiteExamples(make_dummy_examples(spec.task, count), pad_id=0, shapes=SHAPES, device="cpu")
    if unit == "record":
        return examples
    owners = np.random.default_rng(seed).integers(0, max(1, count // 3), size=count)
    users = [np.flatnonzero(owners == user) for user in np.unique(owners)]
    return UserExamples(examples, users, most_records=2, most_users=4)


def run_round(
    setup: Room, units: Any, *, number: int = 1, start: Adapter | None = None, rank: int | None = None
) -> Adapter:
    planned = replace(make_work().plan, unit=units.unit, local_steps=3)
    if setup.model.has_frozen_prefix:
        units.cache_frozen_states(setup.model)
    units.cache_reference(setup.model)
    work = make_work(round=number, plan=planned, declared_size=30, rank=rank)
    return release_round(setup.model, units, work, adapter=start or FIRST[setup.model.spec])


FIRST = {spec: Adapter.from_task_model(build_task_model(spec)) for spec in KINDS.values()}


def divide_units(setup: Room, count: int = 41, unit: str = "record") -> DividedUnits:
    return setup.devices.divide_units(make_units(setup.model.spec, count, unit), max_grad_norm=MAX_GRAD_NORM)


def has_ended(pid: int, *, within_s: float = 20.0) -> bool:
    """Whether a process ends in time; a zombie process counts as ended."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.by_day("cached states-41-record", "a reference-41-user", "a reference-2-record", "cached states-0-record")
@pytest.mark.parametrize("unit", ["record", "user"])
@pytest.mark.parametrize("count", [41, 2, 0])
def test_several_devices_release_the_same_result_as_a_single_device(room: Room, unit: str, count: int) -> None:
    local_units, distributed = make_units(room.model.spec, count, unit), divide_units(room, count, unit)
    first = run_round(room, local_units)
    assert run_round(room, distributed).digest() == first.digest()
    second = run_round(room, local_units, number=2, start=first)
    assert run_round(room, distributed, number=2, start=first).digest() == second.digest()
    assert count == 0 or second.digest() != first.digest()


def test_several_devices_train_the_rank_of_the_site(three_devices: Room) -> None:
    local_units, distributed = make_units(three_devices.model.spec, 41), divide_units(three_devices)
    part = run_round(three_devices, local_units, rank=1)
    assert part.num_values < FIRST[three_devices.model.spec].num_values
    assert run_round(three_devices, distributed, rank=1).digest() == part.digest()


def test_every_device_contributes_to_the_sum(three_devices: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = divide_units(three_devices)
    counted: list[int] = []
    answers = three_devices.devices._workers.collect_answers

    def note_answers() -> list[Any]:
        answers_seen = answers()
        counted.extend(answer[0] for answer in answers_seen if isinstance(answer, tuple))
        return answers_seen

    monkeypatch.setattr(three_devices.devices._workers, "collect_answers", note_answers)
    run_round(three_devices, distributed)
    assert len(counted) == 3 * 2, "three steps on each of the two other devices"
    assert min(counted) > 0
    assert len(distributed._own) == 14


@given(count=st.integers(0, 60), ranks=st.integers(1, 7), seed=st.integers(0, 99))
def test_each_unit_is_on_one_device_with_all_records(count: int, ranks: int, seed: int) -> None:
    spec = KINDS["cached states"]
    examples, by_user = (make_units(spec, count, unit, seed=seed) for unit in ("record", "user"))
    for units in (examples, by_user):
        shares = [units.select_shard(rank, ranks, "cpu") for rank in range(ranks)]
        assert sum(len(own) for own, _ in shares) == len(units)
        all_records = np.concatenate([records for _, records in shares])
        assert sorted(all_records.tolist()) == list(range(count)), "each record must be on one device"
        for own, records in shares:
            assert (np.diff(records) > 0).all()
            assert own.num_tokens == sum(examples._dataset.lengths[records]) if isinstance(own, SiteExamples) else True
    for user, records in enumerate(by_user._users):
        _, distributed = by_user.select_shard(assign_device(user, ranks), ranks, "cpu")
        assert set(records.tolist()) <= set(distributed.tolist()), "a user's records must be on one device"


def test_missing_unit_is_detected(three_devices: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = divide_units(three_devices)
    by_rank = distributed._split_by_rank
    monkeypatch.setattr(distributed, "_split_by_rank", lambda *options: [shard[:-1] for shard in by_rank(*options)])
    with pytest.raises(AssertionError, match="each sampled unit must be counted exactly once"):
        run_round(three_devices, distributed)
    monkeypatch.setattr(distributed, "_split_by_rank", lambda *options: [by_rank(*options)[0]] * 3)
    with pytest.raises((AssertionError, RunError)):
        run_round(three_devices, distributed)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, "its process ended .*nothing is released in this round"),
        (signal.SIGSTOP, "no answer in 1 s.*nothing is released in this round"),
    ],
    ids=["dies", "hangs"],
)
def test_failed_or_hung_device_ends_only_the_current_round(
    three_devices: Room, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    distributed = divide_units(three_devices)
    expected = run_round(three_devices, make_units(three_devices.model.spec, 41))
    pids, steps, own_cut = three_devices.pids, [], distributed._own.batch_units

    def fail_in_second_step(sampled: Any) -> Any:
        steps.append(len(sampled))
        if len(steps) == 2:
            monkeypatch.setattr(devices_module, "HEARTBEAT_TIMEOUT_S", 90.0 if number == signal.SIGKILL else 1.0)
            os.kill(pids[1], number)
        return own_cut(sampled)

    with monkeypatch.context() as patched:
        patched.setattr(distributed._own, "batch_units", fail_in_second_step)
        with pytest.raises(RunError, match=message):
            run_round(three_devices, distributed)
    assert len(steps) == 2, "no further step may run"
    assert all(has_ended(pid) for pid in pids)
    monkeypatch.setattr(devices_module, "HEARTBEAT_TIMEOUT_S", 90.0)
    assert run_round(three_devices, distributed).digest() == expected.digest()
    assert not set(pids) & set(three_devices.pids)


def test_long_computation_is_not_treated_as_a_hang(three_devices: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """The assignment of long records determines the duration, and no record may decide whether a round succeeds."""
    workers = three_devices.devices.prepare_workers()
    process, pipe = workers._members[0]
    monkeypatch.setattr(devices_module, "HEARTBEAT_TIMEOUT_S", 0.5)
    own_end, other_end = multiprocessing.Pipe()

    def work_slowly() -> None:
        for _ in range(4):
            time.sleep(0.2)
            other_end.send((devices_module._AT_WORK, None))
        other_end.send((True, "done"))

    with monkeypatch.context() as patched:
        patched.setattr(workers, "_members", [(process, own_end), *workers._members[1:]])
        threading.Thread(target=work_slowly).start()
        assert workers._answer(1) == "done"
    assert workers._members[0] == (process, pipe)
    # A device reports progress after each micro-batch.
    units, signs = make_units(three_devices.model.spec, 41), Mock()
    device = _Device(three_devices.model, signs)
    assert list(device._report_progress("abc")) == ["a", "b", "c"]
    assert signs.call_count == 3
    device.store_units(0, units)
    device.cache_frozen_states(0, None)
    assert signs.call_count > 3, "it must also report progress in the frozen layers"


def test_failure_on_the_first_device_discards_the_whole_step(
    three_devices: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed = divide_units(three_devices)
    expected = run_round(three_devices, make_units(three_devices.model.spec, 41))
    monkeypatch.setattr(devices_module, "HEARTBEAT_TIMEOUT_S", 90.0)

    with monkeypatch.context() as patched:
        patched.setattr(distributed._own, "batch_units", Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            run_round(three_devices, distributed)
    assert three_devices.devices._workers.is_broken, "the other devices' sums of this step must be discarded"
    assert run_round(three_devices, distributed).digest() == expected.digest()


@pytest.mark.nightly
def test_failed_device_comparison_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: if a second device rounded some dummy examples differently, the third request was accepted."""
    monkeypatch.setattr(devices_module, "_differ", set())
    spec, outcome = KINDS["a reference"], DeviceTrial.run_trial
    with monkeypatch.context() as patched:
        patched.setattr(DeviceTrial, "run_trial", lambda *args: outcome(*args)._replace(bits="00" * 32))
        with pytest.raises(ConfigError, match="must be 1 on this machine"):
            start_devices(spec, 2)
    for _ in range(2):  # although this draw gives equal bits
        with pytest.raises(ConfigError, match="must be 1 on this machine"):
            start_devices(spec, 2)
    start_devices(replace(spec, seed=4), 2).devices._workers.end()


def test_device_with_different_gradients_is_refused() -> None:
    spec = KINDS["cached states"]
    other_spec = replace(spec, model=replace(spec.model, dtype="bfloat16"))
    with pytest.raises(ConfigError, match=r"runtime\.num_devices = 2: must be 1 on this machine"):
        start_devices(spec, 2, other_spec=other_spec)


@pytest.mark.nightly
def test_device_processes_end_with_their_parent() -> None:
    code = (
        "import os, sys\n"
        "from tests.training.test_devices import KINDS, start_devices\n"
        "room = start_devices(KINDS['cached states'], 2)\n"
        "print(*room.pids, flush=True)\n"
        "sys.stdin.read()\n"
    )
    options = {"env": os.environ | {"PYTHONPATH": str(REPOSITORY)}, "cwd": REPOSITORY, "text": True}
    command = [sys.executable, "-c", code]
    with Forked(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options) as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert pids
        process.kill()
    assert all(has_ended(pid) for pid in pids)


def test_unused_units_are_freed_and_device_errors_are_reported(three_devices: Room) -> None:
    first = divide_units(three_devices, 9)
    run_round(three_devices, first)
    number = first._number
    del first
    run_round(three_devices, divide_units(three_devices, 9))
    workers = three_devices.devices.prepare_workers()
    workers.ask_all(_Device.cache_reference, number)
    with pytest.raises(RunError, match=f"device 1: KeyError: {number}"):
        workers.collect_answers()
    assert workers.is_broken
    with pytest.raises(RunError, match="a device on this machine failed"):
        workers.ask_all(_Device.cache_reference, 0)


def test_unavailable_gpu_count_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_run_devices(RuntimeSpec(device="cpu", num_devices=3)) == [torch.device("cpu")] * 3
    monkeypatch.setattr(machine, "find_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    two = choose_run_devices(RuntimeSpec(num_devices=2))
    assert [str(device) for device in two] == ["cuda", "cuda:1"]
    with pytest.raises(ConfigError, match=r"runtime\.num_devices = 3: must be at most 2"):
        choose_run_devices(RuntimeSpec(num_devices=3))

"""Multi-GPU training at one site: each device sums the clipped contributions of its own units in integers.

The first device belongs to the training process, which samples, draws the records of each user, adds the noise once and
takes the step, exactly as at a site with one device. Every other device has its own worker process with the same model
and a shard of the records. For each step a worker receives the adapter's values and the sampled units of its shard,
and returns one integer sum. It has no access to noise, ledger, key or policy.

Guarantee: a step is bit-identical to a step on one device. Each unit is on exactly one device
(`examples.assign_device`), the step checks that every sampled unit was added once, integer addition is exact in any
order, and devices that compute dummy examples differently from the first one are refused. If a worker fails or sends
no heartbeat for `HEARTBEAT_TIMEOUT_S`, the round ends with an error before any noise is added, so that nothing is
released.

Values and sums are sent as arrays through each worker's pipe, which no other process on the machine can open. Sums are
copied to the CPU in any case, because noise is added there, so tests without a GPU cover the same code path as several
GPUs.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import secrets
import signal
import socket
import struct
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from fedtune.data import Shapes
from fedtune.model.hf_logging import get_first_line
from fedtune.model.ranks import cut_to_rank
from fedtune.model.spec import TaskModelSpec
from fedtune.privacy.randomness import RandomStream
from fedtune.spec import ConfigError, RunError
from fedtune.system import UNIX_SOCKETS
from fedtune.tasks.task_model import TaskModel, build_task_model
from fedtune.training.accelerators import disable_fused_attention
from fedtune.training.batch_invariance import iter_dummy_batches, max_batch_influence
from fedtune.training.captured import capture_batches, choose_sum_batch
from fedtune.training.dp_step import TensorSums, UnitGradients, add_batches, make_zero_sums
from fedtune.training.examples import IndexArray, SiteExamples, Told, Units, assign_device, ignore_progress
from fedtune.training.machine import prepare_model, resolve_device
from fedtune.training.per_example import record_gradients
from fedtune.training.spec import RuntimeSpec
from fedtune.training.users import UserExamples

HEARTBEAT_TIMEOUT_S = 600.0
"""Timeout in seconds for the heartbeat of a worker, which a worker sends after each micro-batch.

The total duration of a step depends on the assignment of long records, so it must not end a round.
"""
_differ: set[tuple[TaskModelSpec, RuntimeSpec, int]] = set()
"""Models for which this machine's devices computed different bits in this process.

Such models are refused without another trial.
"""
_HEARTBEAT_S = 5.0
_AT_WORK = "at work"
_Examples = SiteExamples | UserExamples


class DeviceTrial(NamedTuple):
    """Parameters of a device trial: arguments of `max_batch_influence`, and the choice of attention kernels."""

    shapes: Shapes
    keeps_states: bool
    max_grad_norm: float
    pad_id: int
    weights_chosen: bool
    disable_fused_attention: bool = False
    captures: bool = True  # whether an accelerator replays captured micro-batches in steps

    @property
    def trial_arguments(self) -> dict[str, Any]:
        """The keyword arguments for `max_batch_influence`."""
        return {
            name: value for name, value in self._asdict().items() if name not in {"disable_fused_attention", "captures"}
        }

    def run_trial(self, model: TaskModel, seed: int, told: Told = ignore_progress) -> Outcome:
        """Run the trial with dummy examples and weights drawn from `seed`, and return its outcome."""
        seen = hashlib.sha256()

        def see(gradients: Mapping[str, torch.Tensor]) -> None:
            for gradient in gradients.values():
                seen.update(gradient.contiguous().numpy().tobytes())

        if self.disable_fused_attention:
            disable_fused_attention()
        moved = max_batch_influence(model, seed=seed, see=see, told=told, **self.trial_arguments)
        return Outcome(seed, moved, seen.hexdigest())

    def capture_batches(self, model: TaskModel) -> None:
        """Capture the micro-batches of a step on the model's accelerator (`captured.capture_batches`)."""
        if self.captures and model.device.type != "cpu":
            made_up = iter_dummy_batches(model, self.shapes, keeps_states=self.keeps_states, pad_id=self.pad_id)
            with closing(made_up):
                capture_batches(model, made_up, max_grad_norm=self.max_grad_norm)


class Outcome(NamedTuple):
    """The outcome of a trial: the batch influence in clip norms, and the SHA-256 of all computed values in hex."""

    seed: int
    moved: float
    bits: str


class Devices:
    """The devices of a site, with one worker process for every device except the first.

    The workers start in the constructor, and end with this object.

    Args:
        model: the model on the first device, in this process.
        spec: the spec from which the workers load the same model.
        runtime: settings with the number of devices, including the first one.
        max_length: the maximum length of an example, in tokens.

    Raises:
        ConfigError: the machine has fewer devices.
    """

    def __init__(self, model: TaskModel, spec: TaskModelSpec, runtime: RuntimeSpec, *, max_length: int) -> None:
        self.model = model
        self._places, self._facts = choose_run_devices(runtime), (spec, runtime, max_length)
        self._load = partial(_load_on_device, spec, runtime, max_length)
        self._numbers = count()
        self._workers = _WorkerPool(self._places[1:], self._load)
        self._trial: DeviceTrial | None = None
        self._expected: str | None = None

    def __len__(self) -> int:
        """Return the number of devices, including the first one."""
        return len(self._places)

    def start_trials(self, trial: DeviceTrial, first: Outcome) -> None:
        """Start the first device's trial on all other devices. `prepare_workers` compares the outcomes.

        The trial is repeated whenever the workers are restarted.

        Raises:
            RunError: a worker failed.
        """
        self._trial, self._expected = trial, first.bits
        self._workers.ask_all(_Device.compute_trial_bits, trial, first.seed)

    def prepare_workers(self) -> _WorkerPool:
        """Return the workers, after comparing their trial with the first device's trial.

        Workers are restarted after a failure.

        Raises:
            ConfigError: the devices do not compute the same bits, in this trial or an earlier trial of this process.
            RunError: a worker failed.
        """
        assert self._trial is not None, "devices must be tested before use"
        if self._expected is None and self._workers.is_broken:
            self._workers.end()
            self._workers = _WorkerPool(self._places[1:], self._load)
            self.start_trials(self._trial, self._trial.run_trial(self.model, secrets.randbits(63)))
        expected, self._expected = self._expected, None
        if expected is not None and (self._facts in _differ or set(self._workers.collect_answers()) != {expected}):
            _differ.add(self._facts)
            self._workers.end()
            bound = "must be 1 on this machine: its devices do not compute bit-identical gradients"
            raise ConfigError("runtime.num_devices", len(self), bound)
        return self._workers

    def divide_units(self, units: _Examples, *, max_grad_norm: float) -> DividedUnits:
        """Divide a site's units among the devices, for steps with the clip norm `max_grad_norm`."""
        return DividedUnits(self, units, next(self._numbers), max_grad_norm=max_grad_norm)

    def select_shard(self, units: _Examples, rank: int) -> tuple[_Examples, IndexArray]:
        """Return the units of one device, and the indices of their records."""
        return units.select_shard(rank, len(self), self._places[rank])


class DividedUnits(Units):
    """A site's privacy units, divided among its devices, for training by `fedtune.training.local`.

    Args:
        devices: the site's devices.
        units: all units; cached states are stored per device, not in this object.
        number: the number by which the workers identify these units.
        max_grad_norm: the clip norm of the steps.
    """

    def __init__(self, devices: Devices, units: _Examples, number: int, *, max_grad_norm: float) -> None:
        self._devices, self._units, self._number, self._max_grad_norm = devices, units, number, max_grad_norm
        self.unit = units.unit
        self._own, self._own_records = devices.select_shard(units, 0)
        self._records: list[IndexArray] = []
        self._workers: _WorkerPool | None = None

    def __len__(self) -> int:
        return len(self._units)

    def cache_frozen_states(
        self, model: TaskModel, *, folder: Path | None = None, told: Told = ignore_progress
    ) -> None:
        """Cache the frozen layers' outputs on every device for its own shard (see `SiteExamples.cache_frozen_states`).

        `told` receives the progress of the first device.
        """
        crew = self._send_shards()
        crew.ask_all(_Device.cache_frozen_states, self._number, folder)
        self._own.cache_frozen_states(model, folder=folder, told=told)
        crew.collect_answers()

    def cache_reference(self, model: TaskModel) -> None:
        """Cache the base model's outputs on every device for its own shard (see `SiteExamples.cache_reference`)."""
        crew = self._send_shards()
        crew.ask_all(_Device.cache_reference, self._number)
        self._own.cache_reference(model)
        crew.collect_answers()

    def _send_shards(self) -> _WorkerPool:
        """Send each worker its shard of the units, and return the workers."""
        crew = self._devices.prepare_workers()
        if crew is not self._workers:
            self._records = [self._own_records]
            for rank in range(1, len(self._devices)):
                share, records = self._devices.select_shard(self._units, rank)
                crew.ask(rank, _Device.store_units, self._number, share)
                self._records.append(records)
            crew.collect_answers()
            weakref.finalize(self, crew.forgotten.append, self._number)
            self._workers = crew
        return crew

    def make_batcher(self, stream: RandomStream) -> Callable[[IndexArray], Iterator[Any]]:
        """Return a function that starts a step on all workers, and cuts the first device's units into micro-batches."""

        def cut(sampled: IndexArray) -> Iterator[Any]:
            drawn = self._units.draw_records(sampled, stream)
            model, (mine, *others) = self._devices.model, self._split_by_rank(sampled, drawn)
            assert self._workers is not None, "the shards were not sent"
            values = _flatten(model.trainable()).numpy()
            for rank, theirs in enumerate(others, start=1):
                about = (self._number, theirs, self._max_grad_norm, model.frozen, model.rank, values)
                self._workers.ask(rank, _Device.sum_contributions, *about)
            return self._own.batch_units(mine)

        return cut

    def _split_by_rank(self, sampled: IndexArray, drawn: Sequence[IndexArray]) -> list[list[IndexArray]]:
        """Return the record indices of the sampled units for each device, relative to the device's own shard."""
        by_rank: list[list[IndexArray]] = [[] for _ in self._records]
        for unit, records in zip(sampled.tolist(), drawn, strict=True):
            rank = assign_device(unit, len(self._devices))
            by_rank[rank].append(np.searchsorted(self._records[rank], records).astype(np.int64))
        return by_rank

    def convert_gradients(self, of_each: UnitGradients) -> UnitGradients:
        """Convert per-example gradients to per-unit gradients."""
        return self._own.convert_gradients(of_each)

    def add_other_devices(self, sums: TensorSums, max_grad_norm: float) -> int:
        """Wait for the workers' sums, and add them to `sums`.

        Returns:
            The number of units in the workers' sums.

        Raises:
            RunError: a worker failed.
        """
        assert self._workers is not None, "no step was started"
        assert max_grad_norm == self._max_grad_norm, "devices clip to different norms"
        num_units, total = 0, _flatten(sums)
        for units, values in self._workers.collect_answers():
            num_units += units
            total += torch.from_numpy(values)
        _copy_values(sums, total)
        return num_units

    def add_plain_gradient(self, model: TaskModel, batch: Any) -> None:
        """Raise an error: non-private gradients are not integers, so they are not supported on several devices."""
        raise AssertionError("steps without privacy run on one device only")


def choose_run_devices(runtime: RuntimeSpec) -> list[torch.device]:
    """Return the devices of a run, starting with the first device.

    On a CPU, the "devices" are processes that share it.

    Raises:
        ConfigError: the machine has fewer GPUs.
    """
    first, count = resolve_device(runtime.device), runtime.devices
    if first.type == "cpu":
        return [first] * count
    if count > (there := torch.accelerator.device_count()):
        raise ConfigError("runtime.num_devices", count, f"must be at most {there}, the number of GPUs of this machine")
    return [first, *(torch.device(first.type, number) for number in range(1, count))]


def _flatten(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Copy all values into one flat tensor on the CPU, in the order of names that all devices use."""
    return torch.cat([tensor.detach().flatten().cpu() for tensor in tensors.values()])


def _copy_values(tensors: Mapping[str, torch.Tensor], values: torch.Tensor) -> None:
    with torch.no_grad():
        lengths = [tensor.numel() for tensor in tensors.values()]
        for tensor, part in zip(tensors.values(), torch.split(values, lengths), strict=True):
            tensor.copy_(part.view_as(tensor))


_Member: TypeAlias = tuple[SpawnProcess, Connection]
"""A worker process, and the pipe to it."""


class _WorkerPool:
    """The worker processes by rank, starting at 1. If a worker fails, all workers are terminated.

    Attributes:
        end: terminates the workers; also called when this object or this process ends.
        forgotten: the numbers of `DividedUnits` that no longer exist, so that workers can delete their shards.

    Raises:
        RunError: a worker failed, in the constructor and in every method.
    """

    def __init__(self, places: Sequence[torch.device], load: Callable[[torch.device], TaskModel]) -> None:
        self.forgotten: list[int] = []
        self._members: list[_Member] = []
        self.end = weakref.finalize(self, _kill_processes, self._members)
        start = multiprocessing.get_context("spawn")
        for place in places:
            ends: tuple[Any, Any] = start.Pipe()
            ours, theirs = ends
            _set_send_timeout(ours)
            process = start.Process(target=_run_worker, args=(theirs, place, load), daemon=True)
            process.start()
            theirs.close()  # only the worker holds the other end now, so a dead worker closes the pipe
            self._members.append((process, ours))
        self._asked: list[int] = []

    @property
    def is_broken(self) -> bool:
        """Whether a worker has ended, or the workers were interrupted during a step."""
        return bool(self._asked) or not self.end.alive or not all(process.is_alive() for process, _ in self._members)

    def ask(self, rank: int, what: Callable[..., Any], *about: Any) -> None:
        """Send a call of `what`, a method of `_Device`, to one worker."""
        try:
            _, pipe = self._members[rank - 1]
            pipe.send((what, about, tuple(self.forgotten)))
        except OSError as error:
            self._raise_failure(get_first_line(error))
        self._asked.append(rank)

    def ask_all(self, what: Callable[..., Any], *about: Any) -> None:
        """Send a call of `what`, a method of `_Device`, to every worker."""
        for rank in range(1, 1 + len(self._members)):
            self.ask(rank, what, *about)
        self.forgotten.clear()

    def collect_answers(self) -> list[Any]:
        """Wait for the results of all outstanding calls, and return them in the order of the calls."""
        answers = [self._answer(rank) for rank in self._asked]
        self._asked = []
        return answers

    def _answer(self, rank: int) -> Any:
        process, pipe = self._members[rank - 1]
        done: bool | str = _AT_WORK
        try:
            while done == _AT_WORK:
                if pipe.poll(HEARTBEAT_TIMEOUT_S):
                    done, answer = pipe.recv()
                else:
                    done, answer = False, f"no answer in {HEARTBEAT_TIMEOUT_S:g} s"
        except (EOFError, OSError):
            process.join(1.0)  # for its exit code
            done, answer = False, f"its process ended with exit code {process.exitcode}"
        if not done:
            self._raise_failure(f"device {rank}: {answer}")
        return answer

    def _raise_failure(self, why: str) -> NoReturn:
        self.end()
        raise RunError(f"a device on this machine failed ({why}); nothing is released in this round")


def _set_send_timeout(pipe: Connection) -> None:
    """Set a send timeout, so that a hung worker raises an error instead of blocking the sender.

    Pipes on Windows have no timeout.
    """
    if UNIX_SOCKETS < 0:
        return
    with socket.socket(fileno=os.dup(pipe.fileno())) as end:  # a duplicate shares the option
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(HEARTBEAT_TIMEOUT_S), 0))


def _kill_processes(members: Sequence[_Member]) -> None:
    """Kill the worker processes immediately, because they have no state to save."""
    for process, pipe in members:
        process.kill()
        pipe.close()
    for process, _ in members:
        process.join(10.0)


class _Device:
    """The worker on another device, with one method for each command of the first device."""

    def __init__(self, model: TaskModel, at_work: Callable[[], None]) -> None:
        self._model, self._at_work = model, at_work
        self._units: dict[int, _Examples] = {}

    def compute_trial_bits(self, trial: DeviceTrial, seed: int) -> str:
        bits = trial.run_trial(self._model, seed).bits
        trial.capture_batches(self._model)
        return bits

    def store_units(self, number: int, units: _Examples) -> None:
        self._units[number] = units

    def forget_units(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._units.pop(number, None)

    def cache_frozen_states(self, number: int, folder: Path | None) -> None:
        self._units[number].cache_frozen_states(self._model, folder=folder, told=lambda *_: self._at_work())

    def cache_reference(self, number: int) -> None:
        self._units[number].cache_reference(self._model)

    def sum_contributions(
        self,
        number: int,
        drawn: Sequence[IndexArray],
        max_grad_norm: float,
        frozen: frozenset[str],
        rank: int | None,
        values: npt.NDArray[np.float32],
    ) -> tuple[int, npt.NDArray[np.int64]]:
        """Sum the clipped contributions of the drawn units at the adapter values `values`.

        Returns:
            The number of units, and the flat sum of their contributions.
        """
        units = self._units[number]
        _copy_values(self._model.trainable(), torch.from_numpy(values))
        with self._model.freeze_tensors(frozen, rank=rank), record_gradients(self._model) as gradients:
            sums = make_zero_sums(cut_to_rank(self._model.list_active_parameters(), rank))
            count = add_batches(
                sums,
                units.convert_gradients(gradients),
                self._report_progress(units.batch_units(drawn)),
                max_grad_norm,
                choose_sum_batch(self._model),
            )
        return count, _flatten(sums).numpy()

    def _report_progress(self, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            yield batch
            self._at_work()


def _run_worker(orders: Connection, place: torch.device, load: Callable[[torch.device], TaskModel]) -> None:
    """Run the worker of another device until its parent process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first device's process handles Ctrl-C
    logging.disable(logging.CRITICAL)  # errors caused by records belong in the site's own log only
    last_report = time.monotonic()

    def report_work() -> None:
        nonlocal last_report
        if time.monotonic() - last_report > _HEARTBEAT_S:
            last_report = time.monotonic()
            orders.send((_AT_WORK, None))

    try:
        device = _Device(load(place), report_work)
        orders.send((_AT_WORK, None))
        while True:
            what, about, forgotten = orders.recv()
            device.forget_units(forgotten)
            orders.send((True, what(device, *about)))
    except Exception as error:
        with suppress(OSError):  # the parent process has ended
            orders.send((False, f"{type(error).__name__}: {get_first_line(error)}"))


def _load_on_device(spec: TaskModelSpec, runtime: RuntimeSpec, max_length: int, place: torch.device) -> TaskModel:
    if resolve_device(runtime.device).type != "cpu":  # also makes this process deterministic
        torch.accelerator.set_device_index(place)
    return prepare_model(partial(build_task_model, spec, device=place), runtime, max_length=max_length)

"""Several devices at one site: each sums the clipped contributions of its own units, in integers.

The first device belongs to the training process: it samples, draws the records of each user, adds the noise once and
takes the step, exactly as at a site with one device.  Every other device has a process of its own, which holds the same
model and its share of the records.  For each step such a process receives the adapter's values and the sampled units of
its share, and returns one sum of integers.  It has no access to noise, ledger, key or policy.

Guarantee: a step is bit-identical to a step on one device.  Each unit is on one device (`examples.assign_device`), the
    step checks that every sampled unit was added once, integer addition is exact in any order, and devices that compute
    dummy examples differently from the first one are refused.  If a process fails or sends nothing for `MOST_WAIT_S`,
    the round ends with an error before any noise is added, so that nothing is released.

Values and sums are sent as arrays through each process's pipe, which nobody else on the machine can open.  Sums go to
the CPU in any case, because noise is added there; so tests without a GPU cover the same code path as several GPUs.
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
from contextlib import suppress
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
from fedtune.model.spec import TaskModelSpec
from fedtune.privacy.randomness import RandomStream
from fedtune.spec import ConfigError, RunError
from fedtune.system import UNIX_SOCKETS
from fedtune.tasks.task_model import TaskModel, build_task_model
from fedtune.training.accelerators import attend_by_products
from fedtune.training.batch_invariance import max_batch_influence
from fedtune.training.dp_step import TensorSums, UnitGradients, add_batches, make_zero_sums
from fedtune.training.examples import Places, SiteExamples, Told, Units, assign_device, ignore_progress
from fedtune.training.machine import prepare_model, resolve_device
from fedtune.training.per_example import record_gradients
from fedtune.training.spec import RuntimeSpec
from fedtune.training.users import UserExamples

MOST_WAIT_S = 600.0
"""Seconds without a sign from another device, which gives one after each micro-batch.  How long its work takes depends
on where long records are, and must not decide whether a round ends."""
_differ: set[tuple[TaskModelSpec, RuntimeSpec, int]] = set()
"""Models for which this machine's devices came to other bits in this process.  Asking again is no other draw."""
_SIGN_EVERY_S = 5.0
_AT_WORK = "at work"
_Examples = SiteExamples | UserExamples


class DeviceTrial(NamedTuple):
    """Parameters for testing a device: arguments of `batch_invariance.max_batch_influence`, and the attention kind."""

    shapes: Shapes
    keeps_states: bool
    max_grad_norm: float
    pad_id: int
    weights_chosen: bool
    attend_by_products: bool = False

    @property
    def trial_arguments(self) -> dict[str, Any]:
        """The arguments for `max_batch_influence`."""
        return {name: value for name, value in self._asdict().items() if name != "attend_by_products"}

    def run_trial(self, model: TaskModel, seed: int, told: Told = ignore_progress) -> Outcome:
        """Run the trial with dummy examples and weights drawn from `seed`, and return its outcome."""
        seen = hashlib.sha256()

        def see(gradients: Mapping[str, torch.Tensor]) -> None:
            for one in gradients.values():
                seen.update(one.contiguous().numpy().tobytes())

        if self.attend_by_products:
            attend_by_products()
        moved = max_batch_influence(model, seed=seed, see=see, told=told, **self.trial_arguments)
        return Outcome(seed, moved, seen.hexdigest())


class Outcome(NamedTuple):
    """The outcome of a trial: the influence of other examples on an example, and the SHA-256, in hex, of all
    results.
    """

    seed: int
    moved: float
    bits: str


class Devices:
    """The devices of a site other than its first one, each with a process that starts at once and ends with this
    object.

    Args:
        model: the model on the first device, in this process.
        spec: the spec from which the other processes load the same model.
        runtime: settings with the number of devices, the first one included.
        max_length: the maximum length of an example, in tokens.

    Raises:
        ConfigError: the machine has fewer devices.
    """

    def __init__(self, model: TaskModel, spec: TaskModelSpec, runtime: RuntimeSpec, *, max_length: int) -> None:
        self.model = model
        self._places, self._facts = choose_run_devices(runtime), (spec, runtime, max_length)
        self._load = partial(_load_on_device, spec, runtime, max_length)
        self._numbers = count()
        self._crew = _Crew(self._places[1:], self._load)
        self._trial: DeviceTrial | None = None
        self._expected: str | None = None

    def __len__(self) -> int:
        """Return the number of devices, the first one included."""
        return len(self._places)

    def start_trials(self, trial: DeviceTrial, first: Outcome) -> None:
        """Start the trial of the first device on all other devices; `prepare_crew` checks the outcome.

        The trial is repeated whenever the processes are restarted.

        Raises:
            RunError: the process of a device failed.
        """
        self._trial, self._expected = trial, first.bits
        self._crew.ask_all(_Device.compute_trial_bits, trial, first.seed)

    def prepare_crew(self) -> _Crew:
        """Return the processes of the other devices, restarted after a failure and checked.

        Raises:
            ConfigError: the devices do not compute the same bits, or did not in an earlier trial of this process.
            RunError: the process of a device failed.
        """
        assert self._trial is not None, "devices are tried before they are used"
        if self._expected is None and self._crew.is_broken:
            self._crew.end()
            self._crew = _Crew(self._places[1:], self._load)
            self.start_trials(self._trial, self._trial.run_trial(self.model, secrets.randbits(63)))
        expected, self._expected = self._expected, None
        if expected is not None and (self._facts in _differ or set(self._crew.collect_answers()) != {expected}):
            _differ.add(self._facts)
            self._crew.end()
            bound = "must be 1 on this machine, because its devices do not compute bitwise equal gradients"
            raise ConfigError("runtime.num_devices", len(self), bound)
        return self._crew

    def divide_units(self, units: _Examples, *, max_grad_norm: float) -> DividedUnits:
        """Divide a site's units among the devices, for steps that clip to `max_grad_norm`."""
        return DividedUnits(self, units, next(self._numbers), max_grad_norm=max_grad_norm)

    def share(self, units: _Examples, rank: int) -> tuple[_Examples, Places]:
        """Return the units of one device, and the indices of their records."""
        return units.share(rank, len(self), self._places[rank])


class DividedUnits(Units):
    """A site's units, divided among its devices, in the form in which `fedtune.training.local` trains on them.

    Args:
        devices: the site's devices.
        units: all units; no cached states are stored in this object.
        number: the number by which the other devices identify these units.
        max_grad_norm: the clip norm of the steps.
    """

    def __init__(self, devices: Devices, units: _Examples, number: int, *, max_grad_norm: float) -> None:
        self._devices, self._units, self._number, self._max_grad_norm = devices, units, number, max_grad_norm
        self.unit = units.unit
        self._own, self._own_records = devices.share(units, 0)
        self._records: list[Places] = []
        self._crew: _Crew | None = None

    def __len__(self) -> int:
        return len(self._units)

    def keep_frozen_states(self, model: TaskModel, *, folder: Path | None = None, told: Told = ignore_progress) -> None:
        """Cache the frozen layers' outputs on every device for its own share, as `SiteExamples.keep_frozen_states`
        does.

        `told` receives the progress of the first device.
        """
        crew = self._send_shares()
        crew.ask_all(_Device.keep_frozen_states, self._number, folder)
        self._own.keep_frozen_states(model, folder=folder, told=told)
        crew.collect_answers()

    def keep_reference(self, model: TaskModel) -> None:
        """Call `SiteExamples.keep_reference` on every device for its share."""
        crew = self._send_shares()
        crew.ask_all(_Device.keep_reference, self._number)
        self._own.keep_reference(model)
        crew.collect_answers()

    def _send_shares(self) -> _Crew:
        """Return the other devices' processes, after sending each of them its share of the units."""
        crew = self._devices.prepare_crew()
        if crew is not self._crew:
            self._records = [self._own_records]
            for rank in range(1, len(self._devices)):
                share, records = self._devices.share(self._units, rank)
                crew.ask(rank, _Device.hold_units, self._number, share)
                self._records.append(records)
            crew.collect_answers()
            weakref.finalize(self, crew.forgotten.append, self._number)
            self._crew = crew
        return crew

    def make_cutter(self, stream: RandomStream) -> Callable[[Places], Iterator[Any]]:
        """Return a function that starts a step on the other devices, and cuts this device's units into
        micro-batches.
        """

        def cut(sampled: Places) -> Iterator[Any]:
            model, (mine, *others) = (
                self._devices.model,
                self._split_by_rank(sampled, self._units.draw_records(sampled, stream)),
            )
            assert self._crew is not None, "nothing was handed out"
            values = _flatten(model.trainable()).numpy()
            for rank, theirs in enumerate(others, start=1):
                about = (self._number, theirs, self._max_grad_norm, model.frozen, values)
                self._crew.ask(rank, _Device.sum_contributions, *about)
            return self._own.cut_drawn(mine)

        return cut

    def _split_by_rank(self, sampled: Places, drawn: Sequence[Places]) -> list[list[Places]]:
        """Return for each device the record indices of its sampled units, relative to the device's own share."""
        by_rank: list[list[Places]] = [[] for _ in self._records]
        for unit, records in zip(sampled.tolist(), drawn, strict=True):
            rank = assign_device(unit, len(self._devices))
            by_rank[rank].append(np.searchsorted(self._records[rank], records).astype(np.int64))
        return by_rank

    def gradients(self, of_each: UnitGradients) -> UnitGradients:
        """Convert per-example gradients to per-unit gradients."""
        return self._own.gradients(of_each)

    def add_other_devices(self, sums: TensorSums, max_grad_norm: float) -> int:
        """Wait for the other devices' sums, and add them to `sums`; return the number of their units.

        Raises:
            RunError: the process of a device failed.
        """
        assert self._crew is not None, "nothing was cut"
        assert max_grad_norm == self._max_grad_norm, "devices clip to different norms"
        num_units, total = 0, _flatten(sums)
        for units, values in self._crew.collect_answers():
            num_units += units
            total += torch.from_numpy(values)
        _copy_values(sums, total)
        return num_units

    def add_plain_gradient(self, model: TaskModel, batch: Any) -> None:
        """Not supported on several devices: the gradients of a non-private step are not integers."""
        raise AssertionError("a step without privacy is taken on one device")


def choose_run_devices(runtime: RuntimeSpec) -> list[torch.device]:
    """Return the devices of a run, the first one first; several "devices" on a CPU are processes that share it.

    Raises:
        ConfigError: the machine has fewer GPUs.
    """
    first, count = resolve_device(runtime.device), runtime.devices
    if first.type == "cpu":
        return [first] * count
    if count > (there := torch.accelerator.device_count()):
        raise ConfigError("runtime.num_devices", count, f"must be at most {there}, the number of GPUs")
    return [first, *(torch.device(first.type, number) for number in range(1, count))]


def _flatten(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Copy all values into one flat tensor on the CPU, in the order of names that all devices share."""
    return torch.cat([one.detach().flatten().cpu() for one in tensors.values()])


def _copy_values(tensors: Mapping[str, torch.Tensor], values: torch.Tensor) -> None:
    with torch.no_grad():
        lengths = [one.numel() for one in tensors.values()]
        for one, part in zip(tensors.values(), torch.split(values, lengths), strict=True):
            one.copy_(part.view_as(one))


_Member: TypeAlias = tuple[SpawnProcess, Connection]
"""Another device's process, and the pipe to it."""


class _Crew:
    """The processes of the other devices, by rank from 1.  If one of them fails, all are terminated.

    Attributes:
        end: terminates the processes; also called when this object or this process ends.
        forgotten: numbers of units that will not be used again.

    Raises:
        RunError: the process of a device failed, in the constructor and in every method.
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
            process = start.Process(target=_serve, args=(theirs, place, load), daemon=True)
            process.start()
            theirs.close()  # the process has the only other one, so that its end is seen here
            self._members.append((process, ours))
        self._asked: list[int] = []

    @property
    def is_broken(self) -> bool:
        """Whether a process has ended, or the processes were interrupted in the middle of a step."""
        return bool(self._asked) or not self.end.alive or not all(process.is_alive() for process, _ in self._members)

    def ask(self, rank: int, what: Callable[..., Any], *about: Any) -> None:
        """Make one device call `what`, a method of `_Device`."""
        try:
            _, pipe = self._members[rank - 1]
            pipe.send((what, about, tuple(self.forgotten)))
        except OSError as error:
            self._fail(get_first_line(error))
        self._asked.append(rank)

    def ask_all(self, what: Callable[..., Any], *about: Any) -> None:
        """Make every device call `what`, a method of `_Device`."""
        for rank in range(1, 1 + len(self._members)):
            self.ask(rank, what, *about)
        self.forgotten.clear()

    def collect_answers(self) -> list[Any]:
        """Wait for the results of all outstanding calls, and return them in the order of the calls."""
        found = [self._answer(rank) for rank in self._asked]
        self._asked = []
        return found

    def _answer(self, rank: int) -> Any:
        process, pipe = self._members[rank - 1]
        done: bool | str = _AT_WORK
        try:
            while done == _AT_WORK:
                done, answer = pipe.recv() if pipe.poll(MOST_WAIT_S) else (False, f"no answer in {MOST_WAIT_S:g} s")
        except (EOFError, OSError):
            process.join(1.0)  # for its exit code
            done, answer = False, f"its process ended with exit code {process.exitcode}"
        if not done:
            self._fail(f"device {rank}: {answer}")
        return answer

    def _fail(self, why: str) -> NoReturn:
        self.end()
        raise RunError(f"a device of this machine failed, so nothing is released from this round ({why})")


def _set_send_timeout(pipe: Connection) -> None:
    """Set a send timeout, so that a hung worker raises instead of blocking the sender; a pipe of Windows has none."""
    if UNIX_SOCKETS < 0:
        return
    with socket.socket(fileno=os.dup(pipe.fileno())) as end:  # the option is that of the pipe's end, whoever sets it
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(MOST_WAIT_S), 0))


def _kill_processes(members: Sequence[_Member]) -> None:
    """Kill the processes at once: they hold nothing that must be saved."""
    for process, pipe in members:
        process.kill()
        pipe.close()
    for process, _ in members:
        process.join(10.0)


class _Device:
    """The worker in another device's process, with one method for each command."""

    def __init__(self, model: TaskModel, at_work: Callable[[], None]) -> None:
        self._model, self._at_work = model, at_work
        self._units: dict[int, _Examples] = {}

    def compute_trial_bits(self, trial: DeviceTrial, seed: int) -> str:
        return trial.run_trial(self._model, seed).bits

    def hold_units(self, number: int, units: _Examples) -> None:
        self._units[number] = units

    def forget_units(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._units.pop(number, None)

    def keep_frozen_states(self, number: int, folder: Path | None) -> None:
        self._units[number].keep_frozen_states(self._model, folder=folder, told=lambda *_: self._at_work())

    def keep_reference(self, number: int) -> None:
        self._units[number].keep_reference(self._model)

    def sum_contributions(
        self,
        number: int,
        drawn: Sequence[Places],
        max_grad_norm: float,
        frozen: frozenset[str],
        values: npt.NDArray[np.float32],
    ) -> tuple[int, npt.NDArray[np.int64]]:
        """Sum the clipped contributions of the drawn units at the adapter values `values`; return their number and the
        sum.
        """
        units = self._units[number]
        _copy_values(self._model.trainable(), torch.from_numpy(values))
        with self._model.freeze_tensors(frozen), record_gradients(self._model) as gradients:
            sums = make_zero_sums(self._model.list_active_parameters())
            count = add_batches(
                sums, units.gradients(gradients), self._report_progress(units.cut_drawn(drawn)), max_grad_norm
            )
        return count, _flatten(sums).numpy()

    def _report_progress(self, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            yield batch
            self._at_work()


def _serve(orders: Connection, place: torch.device, load: Callable[[torch.device], TaskModel]) -> None:
    """Run the process of another device until its parent process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C, which the first device's process answers
    logging.disable(logging.CRITICAL)  # what a record makes fail is for the site's own log alone, which is not here
    said = time.monotonic()

    def report_work() -> None:
        nonlocal said
        if time.monotonic() - said > _SIGN_EVERY_S:
            said = time.monotonic()
            orders.send((_AT_WORK, None))

    try:
        device = _Device(load(place), report_work)
        orders.send((_AT_WORK, None))
        while True:
            what, about, forgotten = orders.recv()
            device.forget_units(forgotten)
            orders.send((True, what(device, *about)))
    except Exception as error:
        with suppress(OSError):  # there is nobody to be told
            orders.send((False, f"{type(error).__name__}: {get_first_line(error)}"))


def _load_on_device(spec: TaskModelSpec, runtime: RuntimeSpec, max_length: int, place: torch.device) -> TaskModel:
    if resolve_device(runtime.device).type != "cpu":  # asked here too, so that this process computes as the first one
        torch.accelerator.set_device_index(place)
    return prepare_model(partial(build_task_model, spec, device=place), runtime, max_length=max_length)

"""Devices, memory and speed of this machine, and how a task model is made ready for it."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedtune import system
from fedtune.data import Shapes, TextDataset, collate
from fedtune.model.fits import usable_positions
from fedtune.model.products import multiply_by_onednn
from fedtune.spec import ConfigError
from fedtune.tasks.inputs import input_of
from fedtune.tasks.task_model import TaskModel
from fedtune.training.accelerators import accelerator, memory_of
from fedtune.training.per_example import attached
from fedtune.training.spec import RuntimeSpec

_ELSEWHERE_MIB = 1024.0  # for kept states where the system does not say how much memory is available
_ELSEWHERE_BYTES = 4 * 2**30  # of all memory, likewise
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_MOST_TIMED, _ENOUGH_S = 512, 0.7  # tokens of the micro-batch that is timed, and seconds of its passes
_GRADIENTS_THAT_PAY, _MOST_PROCESSES, _BYTES_OF_A_PROCESS = 30_000, 4, 2 * 2**30
_TOKENS_ON_GPU, _TOKENS_OF_A_THREAD, _MOST_TOKENS = 16384, 512, 2048
"""Of a micro-batch: on a CPU each step takes as long with more, and the trial before the run longer
(simulations/benchmarks); a GPU waits for its process with less (simulations/gpu)."""
_SHARE_OF_GPU, _SHARE_OF_MEMORY = 0.8, 0.25
"""Of what a model leaves free: a GPU is the run's own, a CPU's memory is everybody's."""


def device_for(wanted: str, *, must_exist: bool = True) -> torch.device:
    """The device that a run's `runtime.device` means here.

    Args:
        wanted: "auto" (an accelerator of any maker, if there is one), "cpu" or "cuda".
        must_exist: False takes the CPU where a GPU is wanted and there is none, to plan for another machine.

    Raises:
        ConfigError: a GPU is wanted, and this torch cannot use one.
    """
    there = None if wanted == "cpu" else accelerator()
    if wanted == "cuda" and (there is None or there.type != "cuda"):
        if must_exist:
            bound = "needs a GPU and a torch build with CUDA; neither 'auto' nor 'cpu' does"
            raise ConfigError("runtime.device", wanted, bound)
        there = None
    return there or torch.device("cpu")


def ready_model(build: Callable[[], TaskModel], runtime: RuntimeSpec, *, max_length: int) -> TaskModel:
    """The task model that `build` makes, as this machine runs it; also sets torch's number of threads.

    Raises:
        ConfigError: the model cannot be loaded, or takes no example of `max_length` tokens.
    """
    torch.set_num_threads(runtime.num_threads or max(1, usable_cores() // runtime.devices))
    _keep_freed_memory()
    model = build()
    if runtime.onednn:
        multiply_by_onednn(model.base)
    if runtime.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    positions = usable_positions(model.base.get_base_model())
    if positions is not None and max_length > positions:
        raise ConfigError("data.max_length", max_length, f"must be at most the model's {positions}")
    return model


def _keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one: it gives large blocks back, and each page is cleared anew.

    That is 8,000 page faults a step of MiniLM, and 4 % of its time (simulations/benchmarks).  The most memory of a
    process stays what it was; it holds it until it ends.
    """
    with suppress(OSError, AttributeError):  # another C library
        allocator = ctypes.CDLL(None).mallopt
        if allocator(_M_MMAP_THRESHOLD, 2**30):  # an old one takes 32 MiB at most
            allocator(_M_TRIM_THRESHOLD, 2**30)


def usable_cores() -> int:
    """The cores that this process may use: fewer than the machine has, where it is bound to some of them.

    OMP_NUM_THREADS lowers it further: threads that wait for each other on busy cores take several times as long.
    """
    cores = len(system.usable_cores(0))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(asked)) if asked.isdecimal() and int(asked) else cores


def processes_that_pay(runtime: RuntimeSpec, *, gradients: float) -> int:
    """How many processes share each step on a CPU where `runtime.num_devices` leaves that open.

    Two threads hardly work faster on a micro-batch than one, and two processes on two of them do; but to begin one
    takes as long as some thousand gradients.

    Args:
        runtime: of a simulation.
        gradients: of single examples that the run computes, in expectation; a public number.
    """
    if runtime.num_devices is not None:
        return runtime.num_devices
    alone = runtime.kind != "simulation" or runtime.num_threads is not None or device_for(runtime.device).type != "cpu"
    if alone or gradients < _GRADIENTS_THAT_PAY:
        return 1
    return max(1, min(usable_cores(), _MOST_PROCESSES, _memory_bytes() // _BYTES_OF_A_PROCESS))


def shapes_for(model: TaskModel, runtime: RuntimeSpec, *, max_length: int) -> Shapes:
    """The shapes of a run's micro-batches on this machine, from public settings alone."""
    positions = usable_positions(model.base.get_base_model())
    most = micro_batch_tokens(runtime, model.device) // model.spec.texts
    fixed = input_of(model.spec).is_fixed
    return Shapes.of(max_length=max_length, max_tokens=most, positions=positions, fixed=fixed)


def micro_batch_tokens(runtime: RuntimeSpec, device: torch.device) -> int:
    """The most padded tokens in a micro-batch on this device, with torch's threads as `ready_model` sets them."""
    if runtime.micro_batch_tokens is not None:
        return runtime.micro_batch_tokens
    if device.type != "cpu":
        return _TOKENS_ON_GPU
    return min(_MOST_TOKENS, _TOKENS_OF_A_THREAD * torch.get_num_threads())


def step_bytes(model: TaskModel, runtime: RuntimeSpec) -> int:
    """The memory set aside for a micro-batch: by default a share of what the machine has, less its models.

    Not of what happens to be free, which would follow from the records of a run before.
    """
    if runtime.step_mib is not None:
        return runtime.step_mib * 2**20
    of_model = model_bytes(model)
    if model.device.type != "cpu":
        of_site = memory_of(model.device) / (runtime.sites_per_gpu or 1)
        return max(0, int(_SHARE_OF_GPU * (of_site - of_model)))
    return max(0, int(_SHARE_OF_MEMORY * (_memory_bytes() / runtime.devices - of_model)))


def model_bytes(model: nn.Module) -> int:
    """The memory of a model as it lies there: weights, whatever their number format, adapter and constants."""
    return sum(one.numel() * one.element_size() for one in chain(model.parameters(), model.buffers()))


def _memory_bytes() -> int:
    """The machine's memory, or what a container of it may use."""
    limits = []
    for path, unit in (("/proc/meminfo", 2**10), ("/sys/fs/cgroup/memory.max", 1)):
        try:
            limits.append(unit * next(int(word) for word in Path(path).read_text().split() if word.isdigit()))
        except (OSError, StopIteration):  # not Linux, or a container without a bound
            continue
    return min(limits, default=_ELSEWHERE_BYTES)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most memory that tensors take while `work` goes on, beyond what they took before.

    On an accelerator the allocator says so.  On a CPU the tensors that torch's operators make are counted, the same in
    each run; what an operator uses within itself is not seen there.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        work()
        return torch.accelerator.max_memory_allocated(device) - before
    live = _LiveTensors()
    with live:
        work()
    return live.peak


class _LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors made meanwhile, from when an operator returns them until nobody has them.

    Attributes:
        peak: the most there were at one time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak, self._bytes = 0, 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        self._known.update(_storages((args, *given.values())))  # what was there before, with what was made meanwhile
        made = func(*args, **given)
        for storage in _storages((made,)):
            if storage not in self._known:
                self._known.add(storage)
                self._bytes += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self._bytes)
        return made

    def _gone(self, num_bytes: int) -> None:
        self._bytes -= num_bytes


def _storages(values: Iterable[Any]) -> Iterator[torch.UntypedStorage]:
    """Of all tensors among these and in their lists, but those of oneDNN, which have none.

    By hand: torch's own walk through any tree took a third of the time that `peak_bytes` takes.
    """
    for one in values:
        if isinstance(one, torch.Tensor):
            if one.layout == torch.strided:
                yield one.untyped_storage()
        elif isinstance(one, list | tuple):
            yield from _storages(one)


def keeps_frozen_states(model: TaskModel, runtime: RuntimeSpec, *, num_tokens: int) -> bool:
    """The frozen layers' outputs for `num_tokens` fit the memory set aside for them."""
    set_aside: float | None = runtime.kept_states_mib
    if set_aside is None:
        try:  # a quarter of what is available, so that a process leaves room for others
            lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
            set_aside = int(lines["MemAvailable"].split()[0]) / 2**10 / 4
        except (OSError, ValueError, LookupError):  # not Linux
            set_aside = _ELSEWHERE_MIB
    return frozen_states_mib(model, num_tokens=num_tokens) <= set_aside


def folder_for_states(model: TaskModel, runtime: RuntimeSpec, *, num_tokens: int) -> Path | None:
    """Where these outputs are kept if memory has no room for them; None: nowhere.

    Raises:
        ConfigError: there is no such folder, or nothing can be written in it.
    """
    if runtime.kept_states_folder is None:
        return None
    folder = Path(runtime.kept_states_folder)
    try:
        with tempfile.TemporaryFile(dir=folder):
            free_mib = shutil.disk_usage(folder).free / 2**20
    except OSError as error:
        bound = f"must be a folder in which this process may write ({error.strerror})"
        raise ConfigError("runtime.kept_states_folder", runtime.kept_states_folder, bound) from None
    return folder if frozen_states_mib(model, num_tokens=num_tokens) <= free_mib / 2 else None


def place_for_states(model: TaskModel, runtime: RuntimeSpec, *, num_tokens: int) -> tuple[bool, Path | None]:
    """Whether the frozen layers' outputs for `num_tokens` are kept, and in which folder if not in memory.

    Raises:
        ConfigError: as `folder_for_states`, where memory has no room.
    """
    if keeps_frozen_states(model, runtime, num_tokens=num_tokens):
        return True, None
    folder = folder_for_states(model, runtime, num_tokens=num_tokens)
    return folder is not None, folder


def room_for_states(num_tokens: int, width: int, *, dtype: torch.dtype, folder: Path | None) -> torch.Tensor:
    """(num_tokens, width) on the CPU, yet to be filled: in memory, or in a file of `folder` that has no name.

    What is written there is open to nobody else, and gone with the tensor or the process, however that ends.

    Raises:
        OSError: the disk has no room.
    """
    if folder is None or num_tokens == 0:
        return torch.empty(num_tokens, width, dtype=dtype)
    handle, name = tempfile.mkstemp(dir=folder, prefix=".fedtune-")
    num_bytes = num_tokens * width * dtype.itemsize
    try:
        if hasattr(os, "posix_fallocate"):
            # All of it now: a disk that is full later would end the process in the middle of a round.
            os.posix_fallocate(handle, 0, num_bytes)
        else:  # macOS has no such call
            os.truncate(handle, num_bytes)
        return torch.from_file(name, shared=True, size=num_tokens * width, dtype=dtype).view(num_tokens, width)
    finally:
        os.close(handle)
        os.unlink(name)


def frozen_states_mib(model: TaskModel, *, num_tokens: int) -> float:
    """The memory that the frozen layers' outputs for `num_tokens` take, in MiB; 0 where the first layer trains."""
    width = model.base.config.get_text_config().hidden_size * model.base.dtype.itemsize
    return num_tokens * width / 2**20 if model.skips_layers else 0.0


def seconds_per_example(
    model: TaskModel, *, max_length: int, runtime: RuntimeSpec, kept: bool, draws: Any
) -> tuple[float, float]:
    """Seconds for one example of full length: what is computed once, and its gradient in each step.

    Once are frozen states, where they are `kept`, and what a preference is measured against.

    Each is the least of a few passes over a micro-batch that `draws`, a generator of numpy's, makes up.
    """
    most = min(_MOST_TIMED, micro_batch_tokens(runtime, model.device))
    count = max(1, most // (max_length * model.spec.texts))
    rows = model.made_up([max_length] * (count * model.spec.texts), draws)
    targets = model.task.made_up_targets(rows, spec=model.spec, draws=draws, first=lambda _: 0)  # each token supervised
    batch = collate(TextDataset(rows, targets, model.spec.texts), range(count), pad_id=0).to(model.device)
    below = 0.0
    if kept and (states := model.frozen_states(batch)) is not None:
        below = _least_seconds(model, lambda: model.frozen_states(batch))
        batch = replace(batch, prefix=states)
    if (reference := model.reference(batch)) is not None:
        below += _least_seconds(model, lambda: model.reference(batch))
        batch = replace(batch, reference=reference)
    with attached(model) as gradients:
        above = _least_seconds(model, lambda: gradients.of(batch))
    return below / len(batch), above / len(batch)


def _least_seconds(model: TaskModel, work: Callable[[], object]) -> float:
    """Time of `work`; the first pass also warms up, and is the only one where it takes long."""
    passes: list[float] = []
    while sum(passes) < _ENOUGH_S and len(passes) < 4:
        begun = time.perf_counter()
        work()
        if model.device.type != "cpu":
            torch.accelerator.synchronize(model.device)
        passes.append(time.perf_counter() - begun)
    return min(passes)

"""Detection of this machine's devices, memory and speed, and preparation of a task model for this machine."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedtune import system
from fedtune.data import Shapes, TextDataset, collate
from fedtune.model.compatibility import get_max_positions
from fedtune.model.frozen_linear import switch_to_onednn
from fedtune.spec import ConfigError
from fedtune.tasks.inputs import get_input_for
from fedtune.tasks.task_model import TaskModel
from fedtune.training.accelerators import find_accelerator, get_total_memory
from fedtune.training.per_example import record_gradients
from fedtune.training.spec import RuntimeSpec

_ELSEWHERE_MIB = 1024.0  # default for cached states, on systems that do not report the available memory
_ELSEWHERE_BYTES = 4 * 2**30  # default for the total memory on such systems
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_MAX_TIMED, _ENOUGH_S = 512, 0.7  # maximum tokens of the timed micro-batch, and total seconds of its passes
_GRADIENTS_THAT_PAY, _MAX_PROCESSES, _BYTES_OF_A_PROCESS = 30_000, 4, 2 * 2**30
_TOKENS_ON_GPU, _TOKENS_OF_A_THREAD, _MAX_TOKENS = 16384, 512, 2048
"""Default numbers of tokens in a micro-batch.

On a CPU, a larger micro-batch is no faster, and the trial before the run takes longer (simulations/benchmarks); on a
GPU a smaller one leaves the device idle (simulations/gpu).
"""
_SHARE_OF_GPU, _SHARE_OF_MEMORY = 0.4, 0.25
"""Fractions of the memory that the model leaves free.

A GPU is used by the run only, and needs a step's memory twice, because graphs of micro-batches keep theirs reserved. A
CPU's memory is used by other processes as well.
"""


def resolve_device(wanted: str, *, must_exist: bool = True) -> torch.device:
    """Return the device for `runtime.device` on this machine.

    Args:
        wanted: "auto" (an accelerator of any vendor, or else the CPU), "cpu" or "cuda".
        must_exist: False falls back to the CPU if a requested GPU is missing, to plan for another machine.

    Raises:
        ConfigError: a GPU is requested, and this torch build cannot use one.
    """
    there = None if wanted == "cpu" else find_accelerator()
    if wanted == "cuda" and (there is None or there.type != "cuda"):
        if must_exist:
            bound = "requires a GPU and a torch build with CUDA; set it to 'auto' or 'cpu' on this machine"
            raise ConfigError("runtime.device", wanted, bound)
        there = None
    return there or torch.device("cpu")


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Set torch's number of threads to `count` for the duration of the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepare_model(build: Callable[[], TaskModel], runtime: RuntimeSpec, *, max_length: int) -> TaskModel:
    """Build the task model with `build`, configure it for this machine, and set torch's number of threads.

    Raises:
        ConfigError: the model cannot be loaded, or does not accept examples of `max_length` tokens.
    """
    torch.set_num_threads(count_threads(runtime))
    _keep_freed_memory()
    model = build()
    if runtime.onednn:
        switch_to_onednn(model.base)
    if runtime.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    positions = get_max_positions(model.base.get_base_model())
    if positions is not None and max_length > positions:
        raise ConfigError("data.max_length", max_length, f"must be at most {positions}, the model's maximum length")
    return model


def _keep_freed_memory() -> None:
    """Configure glibc's malloc to reuse freed memory in the next step instead of returning large blocks to the system.

    Returned blocks cost 8,000 page faults per step of MiniLM, and 4 % of its time (simulations/benchmarks). The peak
    memory of the process does not change, but this memory remains allocated until the process ends.
    """
    with suppress(OSError, AttributeError):  # another C library
        allocator = ctypes.CDLL(None).mallopt
        if allocator(_M_MMAP_THRESHOLD, 2**30):  # an old one takes 32 MiB at most
            allocator(_M_TRIM_THRESHOLD, 2**30)


def count_usable_cores() -> int:
    """Return the number of cores that this process may use, limited by CPU affinity and OMP_NUM_THREADS.

    The OMP_NUM_THREADS limit matters because threads that wait for each other on busy cores take several times as long.
    """
    cores = len(system.cpu_affinity(0))
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(limit)) if limit.isdecimal() and int(limit) else cores


def count_threads(runtime: RuntimeSpec) -> int:
    """Return the number of torch threads in each process of a run."""
    return runtime.num_threads or max(1, count_usable_cores() // runtime.devices)


def choose_num_processes(runtime: RuntimeSpec, *, gradients: float) -> int:
    """Choose the number of processes that share each step.

    The result is `runtime.num_devices` if it is set, otherwise a number that suits this CPU.

    A second thread hardly speeds up a micro-batch, but a second process computes another micro-batch at the same time.
    Starting a process, however, takes as long as several thousand gradients.

    Args:
        runtime: settings of a simulation.
        gradients: the expected number of per-example gradients in the run; a public number.
    """
    if runtime.num_devices is not None:
        return runtime.num_devices
    alone = (
        runtime.kind != "simulation" or runtime.num_threads is not None or resolve_device(runtime.device).type != "cpu"
    )
    if alone or gradients < _GRADIENTS_THAT_PAY:
        return 1
    return max(1, min(count_usable_cores(), _MAX_PROCESSES, _measure_memory_bytes() // _BYTES_OF_A_PROCESS))


def choose_micro_batch_shapes(model: TaskModel, runtime: RuntimeSpec, *, max_length: int) -> Shapes:
    """Choose the micro-batch shapes of a run on this machine from public settings only."""
    positions = get_max_positions(model.base.get_base_model())
    most = micro_batch_tokens(runtime, model.device) // model.spec.texts
    fixed = get_input_for(model.spec).is_fixed
    return Shapes.from_limits(max_length=max_length, max_tokens=most, positions=positions, fixed=fixed)


def micro_batch_tokens(runtime: RuntimeSpec, device: torch.device) -> int:
    """Return the maximum number of padded tokens in a micro-batch on this device.

    The default for a CPU depends on the number of torch threads, which `prepare_model` sets.
    """
    if runtime.micro_batch_tokens is not None:
        return runtime.micro_batch_tokens
    if device.type != "cpu":
        return _TOKENS_ON_GPU
    return min(_MAX_TOKENS, _TOKENS_OF_A_THREAD * torch.get_num_threads())


def compute_step_bytes(model: TaskModel, runtime: RuntimeSpec) -> int:
    """Return the memory budget of a micro-batch in bytes.

    The default is a fraction of the memory that the model leaves free.

    The default does not depend on the free memory at the moment, which could depend on the records of an earlier run.
    """
    if runtime.step_mib is not None:
        return runtime.step_mib * 2**20
    of_model = measure_model_bytes(model)
    if model.device.type != "cpu":
        of_site = get_total_memory(model.device) / (runtime.sites_per_gpu or 1)
        return max(0, int(_SHARE_OF_GPU * (of_site - of_model)))
    return max(0, int(_SHARE_OF_MEMORY * (_measure_memory_bytes() / runtime.devices - of_model)))


def measure_model_bytes(model: nn.Module) -> int:
    """Return the memory of a model in bytes: weights in their number format, adapter and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in chain(model.parameters(), model.buffers()))


def _measure_memory_bytes() -> int:
    """Return the machine's memory in bytes, or the container's limit if that is lower."""
    limits = []
    for path, unit in (("/proc/meminfo", 2**10), ("/sys/fs/cgroup/memory.max", 1)):
        try:
            limits.append(unit * next(int(word) for word in Path(path).read_text().split() if word.isdigit()))
        except (OSError, StopIteration):  # not Linux, or a container without a bound
            continue
    return min(limits, default=_ELSEWHERE_BYTES)


def measure_peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Measure the peak memory of tensors during `work` in bytes, in addition to the memory in use before.

    On an accelerator the allocator reports the peak. On a CPU the outputs of torch's operators are counted, which is
    reproducible but excludes temporary memory inside an operator.
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
    """Context that counts the bytes of tensors created by torch operators until the tensors are freed.

    Attributes:
        peak: the peak number of bytes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak, self._bytes = 0, 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        # tensors that existed before, with buffers created since
        self._known.update(_iter_storages((args, *keywords.values())))
        result = func(*args, **keywords)
        for storage in _iter_storages((result,)):
            if storage not in self._known:
                self._known.add(storage)
                self._bytes += storage.nbytes()
                weakref.finalize(storage, self._subtract_freed, storage.nbytes())
        self.peak = max(self.peak, self._bytes)
        return result

    def _subtract_freed(self, num_bytes: int) -> None:
        self._bytes -= num_bytes


def _iter_storages(values: Iterable[Any]) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of all tensors in `values` and its nested lists.

    oneDNN tensors have no storage and are skipped.

    The traversal is written by hand, because torch's generic tree traversal took a third of the time of
    `measure_peak_bytes`.
    """
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.layout == torch.strided:
                yield value.untyped_storage()
        elif isinstance(value, list | tuple):
            yield from _iter_storages(value)


def do_frozen_states_fit(model: TaskModel, runtime: RuntimeSpec, *, num_tokens: int) -> bool:
    """Whether the cached outputs of the frozen layers for `num_tokens` tokens fit into the memory budget."""
    set_aside: float | None = runtime.kept_states_mib
    if set_aside is None:
        try:  # a quarter of the available memory, which leaves room for other processes
            lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
            set_aside = int(lines["MemAvailable"].split()[0]) / 2**10 / 4
        except (OSError, ValueError, LookupError):  # not Linux
            set_aside = _ELSEWHERE_MIB
    return measure_frozen_states_mib(model, num_tokens=num_tokens) <= set_aside


def find_frozen_states_folder(model: TaskModel, runtime: RuntimeSpec, *, num_tokens: int) -> Path | None:
    """Return the folder for cached outputs that do not fit in memory.

    None if no folder is configured, or if its disk has too little free space.

    Raises:
        ConfigError: the folder does not exist, or is not writable.
    """
    if runtime.kept_states_folder is None:
        return None
    folder = Path(runtime.kept_states_folder)
    try:
        with tempfile.TemporaryFile(dir=folder):
            free_mib = shutil.disk_usage(folder).free / 2**20
    except OSError as error:
        bound = f"must be a folder that this process can write to ({error.strerror})"
        raise ConfigError("runtime.kept_states_folder", runtime.kept_states_folder, bound) from None
    return folder if measure_frozen_states_mib(model, num_tokens=num_tokens) <= free_mib / 2 else None


def choose_hidden_states_location(
    model: TaskModel, runtime: RuntimeSpec, *, num_tokens: int
) -> tuple[bool, Path | None]:
    """Decide whether to cache the frozen layers' outputs, and in which folder (None: in memory).

    Raises:
        ConfigError: as in `find_frozen_states_folder`, if the outputs do not fit in memory.
    """
    if do_frozen_states_fit(model, runtime, num_tokens=num_tokens):
        return True, None
    folder = find_frozen_states_folder(model, runtime, num_tokens=num_tokens)
    return folder is not None, folder


def allocate_states(num_tokens: int, width: int, *, dtype: torch.dtype, folder: Path | None) -> torch.Tensor:
    """Allocate an uninitialized (num_tokens, width) tensor on the CPU, in memory or in an unnamed file in `folder`.

    No other process can open that file, and it disappears with the tensor or the process, even after a crash.

    Raises:
        OSError: the disk is full.
    """
    if folder is None or num_tokens == 0:
        return torch.empty(num_tokens, width, dtype=dtype)
    handle, name = tempfile.mkstemp(dir=folder, prefix=".fedtune-")
    num_bytes = num_tokens * width * dtype.itemsize
    try:
        if hasattr(os, "posix_fallocate"):
            # Allocate all blocks now: a disk that fills up later would kill the process in the middle of a round.
            os.posix_fallocate(handle, 0, num_bytes)
        else:  # macOS has no such call
            os.truncate(handle, num_bytes)
        return torch.from_file(name, shared=True, size=num_tokens * width, dtype=dtype).view(num_tokens, width)
    finally:
        os.close(handle)
        os.unlink(name)


def measure_frozen_states_mib(model: TaskModel, *, num_tokens: int) -> float:
    """Return the memory in MiB of the frozen layers' outputs for `num_tokens` tokens; 0 if no layer is frozen."""
    width = model.base.config.get_text_config().hidden_size * model.base.dtype.itemsize
    return num_tokens * width / 2**20 if model.has_frozen_prefix else 0.0


def measure_example_seconds(
    model: TaskModel, *, max_length: int, runtime: RuntimeSpec, kept: bool, draws: Any
) -> tuple[float, float]:
    """Measure the seconds per full-length example for the one-time computation and for the gradient in a step.

    The one-time computation covers the frozen states, if they are cached (`kept`), and the reference of a preference
    task. Each time is the minimum of a few passes over a micro-batch of dummy examples, drawn from the NumPy generator
    `draws`.
    """
    most = min(_MAX_TIMED, micro_batch_tokens(runtime, model.device))
    count = max(1, most // (max_length * model.spec.texts))
    rows = model.generate_dummies([max_length] * (count * model.spec.texts), draws)
    targets = model.task.dummy_targets(rows, spec=model.spec, draws=draws, first=lambda _: 0)  # each token supervised
    batch = collate(TextDataset(rows, targets, model.spec.texts), range(count), pad_id=0).to(model.device)
    below = 0.0
    if kept and (states := model.compute_frozen_states(batch)) is not None:
        below = _measure_seconds(model, lambda: model.compute_frozen_states(batch))
        batch = replace(batch, prefix=states)
    if (reference := model.reference(batch)) is not None:
        below += _measure_seconds(model, lambda: model.reference(batch))
        batch = replace(batch, reference=reference)
    with record_gradients(model) as gradients:
        above = _measure_seconds(model, lambda: gradients.compute_gradients(batch))
    return below / len(batch), above / len(batch)


def _measure_seconds(model: TaskModel, work: Callable[[], object]) -> float:
    """Measure a few passes of `work`, and return the shortest duration in seconds.

    The first pass also warms up; a slow first pass is the only one.
    """
    passes: list[float] = []
    while sum(passes) < _ENOUGH_S and len(passes) < 4:
        begun = time.perf_counter()
        work()
        if model.device.type != "cpu":
            torch.accelerator.synchronize(model.device)
        passes.append(time.perf_counter() - begun)
    return min(passes)

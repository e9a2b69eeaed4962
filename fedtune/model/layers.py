"""A base's layers: adapted, skipped where they are frozen, recomputed, computed row by row, and the last one.

**Adapters** by PEFT, on the linear modules of chosen layers.

**The frozen prefix.**  An adapter on the last layers of a base leaves the layers before them as they are.  What they
make of a record depends on that record and the public base alone, so a site may compute it once and start every later
pass there.

**The output layer** of a language model costs as much as eight of SmolLM2's layers, and training needs it only where a
token is learnt.  Where those are is the record's own affair, so they are computed for each record by itself.

**Gradient checkpointing.**  A checkpointed layer stores its input alone and runs a second time in the backward pass
(Chen et al. 2016, arXiv 1604.06174).  Re-entrant checkpointing runs the first pass without gradients, in which those of
single examples are not looked for, and the second one inside the backward pass as an ordinary forward and backward.

**Activations, row by row.**  On a CPU torch computes most elements of a tensor in vectors, and the last few of each
thread's share by a scalar function that rounds some values otherwise (3 in 100 for sigmoid, 35 in 100 for GELU).  So
the place of a record would decide its bits, and a model's weights can enlarge a last bit as they like.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedtune.model.ia3_and_dora import scale_modules
from fedtune.model.quiet import quiet
from fedtune.model.spec import LoraSpec
from fedtune.spec import ConfigError


def attach_adapters(base: PreTrainedModel, *, spec: LoraSpec, predicts_tokens: bool, seed: int) -> PeftModel:
    """Wrap `base`, which already lies on its device, in float32 adapters: A random, B and what scales zero.

    Args:
        base: the frozen model; changed in place.
        spec: which modules, and how.
        predicts_tokens: chooses PEFT's wrapper.
        seed: of A's start.  It is drawn on the CPU, so that it is the same for every device.

    Raises:
        ConfigError: for `lora.layers` or `lora.target_modules` that the base does not have, or a `lora.rank` that none
            of its modules can use.
    """
    config = _peft_config(base, spec, TaskType.CAUSAL_LM if predicts_tokens else TaskType.FEATURE_EXTRACTION)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(base, config)
    scale_modules(model)
    if not spec.train_a:
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
    return model


def _peft_config(base: nn.Module, spec: LoraSpec, kind: TaskType) -> PeftConfig:
    stack_name, stack = layer_stack(base)
    count = len(stack)
    if not all(-count <= layer < count for layer in spec.layers or ()):
        bound = f"must lie from {-count} to {count - 1}: the base has {count} layers; lora.layers=null adapts them all"
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
        for name in spec.target_modules:  # PEFT would pass over a misspelt one in silence
            if not any(f".{full}".endswith(f".{name}") for full in linear):
                bound = f"must be among the base's modules: {', '.join(targets)}"
                raise ConfigError("lora.target_modules", name, bound)
        targets = sorted(spec.target_modules)
    adapted = [full for full in linear if any(f".{full}".endswith(f".{name}") for name in targets)]
    transposed = any(isinstance(module, Conv1D) for module in linear.values())
    if spec.kind == "ia3":  # which PEFT cannot be told the layers of
        return IA3Config(task_type=kind, target_modules=adapted, feedforward_modules=[], fan_in_fan_out=transposed)
    # Before memory is taken: the product of both matrices gains nothing by a rank above every module's own.
    most = max((min(cast(torch.Tensor, linear[full].weight).shape) for full in adapted), default=spec.rank)
    if spec.rank > most:
        raise ConfigError("lora.rank", spec.rank, f"must be at most {most}, the rank of the largest adapted module")
    return LoraConfig(
        task_type=kind,
        r=spec.rank,
        lora_alpha=spec.alpha,
        use_rslora=spec.rslora,
        use_dora=spec.kind == "dora",
        target_modules=targets,
        layers_to_transform=layers,
        layers_pattern=stack_name.rpartition(".")[2],
        fan_in_fan_out=transposed,
    )


def layer_stack(base: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the list of the base's transformer layers.

    Raises:
        ConfigError: for `model.path` when the base is not a plain stack of layers.
    """
    count = base.config.get_text_config().num_hidden_layers  # type: ignore[operator, union-attr]
    for name, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise ConfigError("model.path", type(base).__name__, "must be a model made of one stack of transformer layers")


@contextmanager
def without_adapters(base: PeftModel) -> Iterator[None]:
    """The base as it was before adapters were attached; what trains stays as it is."""
    layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
    try:
        for layer in layers:
            # PEFT's own switch also changes what requires a gradient, and turns on what FFA-LoRA has frozen.
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


class FrozenPrefix:
    """Lets a base start behind its first `depth` layers.

    Args:
        layers: the base's stack of layers; those before the first one that trains are made skippable.

    Attributes:
        depth: how many layers can be skipped; 0 when the first one trains.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        trains = [any(parameter.requires_grad for parameter in layer.parameters()) for layer in layers]
        self.depth = trains.index(True) if True in trains else 0
        self._given: torch.Tensor | None = None
        self._recording = False
        for number in range(self.depth):
            layer = layers[number]
            layer.forward = partial(self._run, layer.forward, number == self.depth - 1)

    @contextmanager
    def given(self, states: torch.Tensor | None) -> Iterator[None]:
        """Take `states`, (n, t, h), for the output of the skipped layers; None skips nothing."""
        before, self._given = self._given, states
        try:
            yield
        finally:
            self._given = before

    def states(self, run: Callable[[], object]) -> torch.Tensor | None:
        """The output of the skipped layers, (n, t, h), while `run` calls the base; the rest of the base does not run.

        None when there is nothing to skip, or when the layers hand on more than one tensor.
        """
        if not self.depth:
            return None
        self._recording = True
        try:
            with torch.no_grad():
                run()
        except _Reached as reached:
            return reached.output if isinstance(reached.output, torch.Tensor) else None
        finally:
            self._recording = False
        return None

    def _run(self, forward: Callable[..., Any], last: bool, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._given is not None:
            return self._given
        output = forward(hidden, *args, **kwargs)
        if last and self._recording:
            raise _Reached(output)
        return output


class OutputLayer:
    """A language model's last layer, which scores every token of the vocabulary, run where a token is learnt.

    Args:
        base: one that changes the scores afterwards, by a cap or a scale, is run whole; one without such a layer, too.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self._layer = base.get_output_embeddings()
        self._apart = isinstance(self._layer, nn.Linear) and self._is_last(base)

    def inputs(self, run: Callable[[], Any]) -> torch.Tensor:
        """The layer's input while `run` calls the base, (n, t, h); of a base run whole its scores."""
        if not self._apart:
            return run().logits  # type: ignore[no-any-return]

        def stop(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            raise _Reached(inputs[0])

        hook = self._layer.register_forward_pre_hook(stop)
        try:
            run()
        except _Reached as reached:
            return cast(torch.Tensor, reached.output)
        finally:
            hook.remove()
        raise AssertionError("the base did not come to its output layer")

    def scores(self, inputs: torch.Tensor) -> torch.Tensor:
        """Float32 scores (p, vocabulary) of p places of `inputs`."""
        return (self._layer(inputs) if self._apart else inputs).float()

    def _is_last(self, base: PreTrainedModel) -> bool:
        """The layer's output is what the base gives out, and not changed in place either."""
        seen: list[tuple[torch.Tensor, int]] = []
        hook = self._layer.register_forward_hook(lambda layer, inputs, output: seen.append((output, output._version)))
        try:
            with torch.no_grad():
                output = base(input_ids=torch.zeros(1, 2, dtype=torch.long, device=self._layer.weight.device)).logits
        finally:
            hook.remove()
        return [(id(scores), version) for scores, version in seen] == [(id(output), output._version)]


class _Reached(Exception):
    """Ends a forward pass where nothing more of it is wanted."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output


def checkpoint_layers(layers: nn.ModuleList) -> None:
    """Make every layer from the first one with trainable parameters on recompute itself in the backward pass."""
    for layer in layers:
        if "forward" not in vars(layer):
            trains = any(parameter.requires_grad for parameter in layer.parameters())
            layer.forward = partial(_recompute, layer.forward, trains)


def _recompute(forward: Callable[..., Any], trains: bool, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled() or not (hidden.requires_grad or trains):
        return forward(hidden, *args, **kwargs)
    # Re-entrant checkpointing follows gradients through its positional tensors only.
    if any(isinstance(value, torch.Tensor) and value.requires_grad for value in kwargs.values()):
        bound = "is not possible for this base: its layers pass gradients to each other on the side"
        raise ConfigError("runtime.gradient_checkpointing", True, bound)
    # None flow into the first adapted layer from the frozen ones before it, so they have to start here.
    if not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()
    # No random layer is on in a frozen base, so there is no random state to keep.
    return checkpoint(partial(forward, **kwargs), hidden, *args, use_reentrant=True, preserve_rng_state=False)


_LANES = 64  # a multiple of the elements that a vectorised loop takes at once, on every CPU and for every number format
_HOMES = ("torch.nn.modules.activation", "transformers.activations")


class RowByRow(nn.Module):
    """An activation whose value for a row is the same, bit for bit, in every row of every batch of that length.

    Where vectors end with the rows it works on all at once, else on one after the other.
    """

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """`values` (rows, ...), and what is returned has their shape."""
        # Whether each row begins and ends with a vector, however many rows there are and threads that share them.
        shares, row = math.lcm(*range(1, torch.get_num_threads() + 1)), values.shape[1:].numel()
        whole = values.is_contiguous() and values.shape[-1] % _LANES == 0 and row % (_LANES * shares) == 0
        if values.device.type != "cpu" or whole:
            return self.activation(values)  # type: ignore[no-any-return]
        return torch.stack([self.activation(row.clone()) for row in values])


def compute_by_row(base: nn.Module) -> None:
    """Make every activation in `base` one that rounds by row."""
    for module in list(base.modules()):
        for name, child in module.named_children():
            if type(child).__module__ in _HOMES and not list(child.parameters()):
                setattr(module, name, RowByRow(child))

"""LoRA adapters on a frozen base, by PEFT."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedtune.model.quiet import quiet
from fedtune.model.spec import LoraSpec
from fedtune.spec import ConfigError


def attach_lora(base: PreTrainedModel, *, spec: LoraSpec, predicts_tokens: bool, seed: int) -> PeftModel:
    """Wrap `base`, which already lies on its device, in float32 adapters: A random, B zero.

    Args:
        base: the frozen model; changed in place.
        spec: which modules, and how.
        predicts_tokens: chooses PEFT's wrapper.
        seed: of A's start.  It is drawn on the CPU, so that it is the same for every device.

    Raises:
        ConfigError: for `lora.layers` or `lora.target_modules` that the base does not have.
    """
    stack_name, stack = layer_stack(base)
    layers = _layer_indices(spec, len(stack))
    linear = _linear_modules(nn.ModuleList(stack[layer] for layer in layers))
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM if predicts_tokens else TaskType.FEATURE_EXTRACTION,
        r=spec.rank,
        lora_alpha=spec.alpha,
        use_rslora=spec.rslora,
        target_modules=_targets(spec, linear),
        layers_to_transform=layers,
        layers_pattern=stack_name.rpartition(".")[2],
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear.values()),
    )
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(base, config)
    if not spec.train_a:
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
    return model


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


def _layer_indices(spec: LoraSpec, count: int) -> list[int]:
    if spec.layers is None:
        return list(range(count))
    if not all(-count <= layer < count for layer in spec.layers):
        raise ConfigError(
            "lora.layers", spec.layers, f"must lie from {-count} to {count - 1}: the base has {count} layers"
        )
    return sorted({layer % count for layer in spec.layers})


def _linear_modules(layers: nn.ModuleList) -> dict[str, nn.Module]:
    return {name: module for name, module in layers.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def _targets(spec: LoraSpec, linear: dict[str, nn.Module]) -> list[str]:
    """The last names to adapt; each must be there, for PEFT would pass over a misspelt one in silence."""
    there = {name.rpartition(".")[2] for name in linear}
    if isinstance(spec.target_modules, str):
        return sorted(there)
    absent = [name for name in spec.target_modules if not any(f".{full}".endswith(f".{name}") for full in linear)]
    if absent:
        raise ConfigError(
            "lora.target_modules", absent[0], f"must be among the base's modules: {', '.join(sorted(there))}"
        )
    return sorted(spec.target_modules)

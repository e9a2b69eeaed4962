"""Task models: a frozen base with adapters and a task, with per-example losses, logits and trainable parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from fedtune.data.batching import Batch
from fedtune.model.layers import FrozenPrefix, OutputLayer, checkpoint_layers, find_layer_stack, suspend_adapters
from fedtune.model.spec import LORA_A, LORA_B, TaskModelSpec
from fedtune.tasks.base import Task
from fedtune.tasks.inputs import Row, get_input_for
from fedtune.tasks.pooled import PooledTask
from fedtune.tasks.registry import get_task


class TaskModel(nn.Module):
    """Frozen base model with a small set of tensors that are trained, noised, sent and saved.

    Every module stays in evaluation mode, except modules with trainable parameters of their own: dropout inside the
    base would change an example's gradient from pass to pass.

    Attributes:
        spec: the settings from which the model was built.
        task: the model's task.
        base: PEFT's wrapper around the base; call it for the base's own output.
        head: the task's own tensors; None for a task without a head.
        output: the base's output layer, if it predicts tokens.
        frozen: the names of the trained tensors that are frozen in the current round (`freeze_tensors`).
        rank: the number of rows of A and columns of B that train in the current round; None: all.
        decided_by: see `tasks.base.Model`.
    """

    head: nn.Module | None
    decided_by: torch.Tensor | None = None
    frozen: frozenset[str] = frozenset()
    rank: int | None = None

    def __init__(self, spec: TaskModelSpec, task: Task, base: PeftModel) -> None:
        super().__init__()
        self.spec, self.task, self.base = spec, task, base
        self.head = None
        task.add_head(self)
        self.output = OutputLayer(base.get_base_model()) if task.predicts_tokens else None
        self._prefix = FrozenPrefix(find_layer_stack(base.get_base_model())[1])
        self.train()

    def logits(self, batch: Batch) -> torch.Tensor:
        """Compute the task's float32 logits, whose first axis is the row or the example."""
        with self._prefix.use_states(batch.prefix):
            return self.task.logits(self, batch)

    def losses(self, batch: Batch) -> torch.Tensor:
        """Compute each example's loss, (examples,) float32; for an empty batch, the base is not run.

        A loss depends on its example alone, so that clipping bounds the influence of an example: with a mean over the
        batch's tokens, the length of one example would rescale the gradients of the others.
        """
        if len(batch.input_ids) == 0:
            return torch.zeros(0, device=self.device, requires_grad=torch.is_grad_enabled())
        batch = self._add_reference(batch)
        with self._prefix.use_states(batch.prefix):
            return self.task.losses(self, batch)[: len(batch)]

    def figures(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Compute the per-example values from which the scores are computed (see `Task.outputs_per_example`)."""
        batch = self._add_reference(batch)
        with self._prefix.use_states(batch.prefix):
            return self.task.outputs_per_example(self, batch)

    def embed(self, batch: Batch) -> torch.Tensor:
        """Compute each example's embedding, (examples, h) float32, which the head of a `PooledTask` reads."""
        assert isinstance(self.task, PooledTask)
        with self._prefix.use_states(batch.prefix):
            return self.task.embed(self, batch.input_ids, batch.attention_mask)

    def reference(self, batch: Batch) -> torch.Tensor | None:
        """Compute each example's reference values from the base without adapters; None for a task without a reference.

        The values do not depend on the adapter.  A batch that contains them as `reference` skips this second pass.
        """
        if not self.task.has_reference:
            return None
        with torch.no_grad(), self._prefix.use_states(batch.prefix), suspend_adapters(self.base):
            return self.task.reference(self, batch)

    def _add_reference(self, batch: Batch) -> Batch:
        if not self.task.has_reference or batch.reference is not None:
            return batch
        return replace(batch, reference=self.reference(batch))

    def compute_frozen_states(self, batch: Batch) -> torch.Tensor | None:
        """Compute the output of the layers below the first trained layer, (n, t, h), which does not depend on the
        adapter.

        A batch that contains it as `prefix` skips those layers.  The result is None if no layers can be skipped.
        """
        return self._prefix.compute_states(
            lambda: get_input_for(self.spec).embed_rows(self.base, batch.input_ids, batch.attention_mask)
        )

    def train(self, mode: bool = True) -> TaskModel:
        """Set training mode for modules with trainable parameters of their own, and evaluation mode for all others."""
        super().train(False)
        for module in self.modules():
            if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
                module.train(mode)
        return self

    @property
    def has_frozen_prefix(self) -> bool:
        """Whether there are frozen layers below the first trained layer, whose output can be cached."""
        return self._prefix.depth > 0

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(chain(self.parameters(), self.buffers())).device

    @property
    def num_ids(self) -> int:
        """Number of token ids with an embedding in the base."""
        return get_input_for(self.spec).num_ids(self.base)

    def generate_dummies(self, lengths: Sequence[int], draws: np.random.Generator) -> tuple[Row, ...]:
        """Generate random inputs of these lengths, for tests of the model."""
        return get_input_for(self.spec).generate_dummies(self.base, lengths, draws)

    def collect_adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Return all adapter and head tensors by their public names, sorted by name, including frozen tensors.

        The names are PEFT's own in a saved adapter ("base_model.model....lora_A.weight"), "....scales.offset" for
        scales (`fedtune.model.ia3_and_dora`), and "head.weight".
        """
        named = {
            name.removeprefix("base.").replace(".default.", "."): parameter
            for name, parameter in self.named_parameters()
            if name.startswith("head.") or any(part in name for part in (LORA_A, LORA_B, ".scales."))
        }
        return dict(sorted(named.items()))

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the trained and released tensors, sorted by name, including tensors that are frozen in this round."""
        parameters = self.collect_adapter_parameters().items()
        return {name: parameter for name, parameter in parameters if parameter.requires_grad or name in self.frozen}

    def list_active_parameters(self) -> dict[str, nn.Parameter]:
        """Return the tensors that are clipped, noised and updated: all trained tensors that are not frozen in this
        round.
        """
        return {name: tensor for name, tensor in self.collect_adapter_parameters().items() if tensor.requires_grad}

    @contextmanager
    def freeze_tensors(self, names: frozenset[str], *, rank: int | None = None) -> Iterator[None]:
        """Freeze the trained tensors with these names, and LoRA's pairs beyond `rank`, for the block's duration."""
        resting = [parameter for name, parameter in self.trainable().items() if name in names]
        self.frozen, self.rank = names, rank
        try:
            for parameter in resting:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in resting:
                parameter.requires_grad_(True)
            self.frozen, self.rank = frozenset(), None

    def enable_gradient_checkpointing(self) -> None:
        """Enable gradient checkpointing: store only the inputs of layers, and recompute the layers in the backward
        pass.

        This takes less memory and about a third more time.  Losses and per-example gradients do not change.

        Raises:
            ConfigError: for `runtime.gradient_checkpointing`, in the first training pass, if gradients also flow
                through keyword arguments of the base's layers.
        """
        checkpoint_layers(find_layer_stack(self.base.get_base_model())[1])


def build_task_model(spec: TaskModelSpec, *, device: torch.device | str = "cpu") -> TaskModel:
    """Load the base, attach adapters at their initial values, and initialize the head.

    Raises:
        ConfigError: the base is not available, or does not support the task, the adapters or per-example clipping.
    """
    model = assemble(spec, device=device)
    model.task.init_head(model)
    return model


def assemble(spec: TaskModelSpec, *, device: torch.device | str) -> TaskModel:
    """Build the model with an uninitialized head, and check that it processes examples independently."""
    task = get_task(spec.task, spec.task_settings)
    task.check_spec(spec)
    check = partial(task.check_base, path=spec.model.path)
    base = get_input_for(spec).build_base(spec, predicts_tokens=task.predicts_tokens, check=check, device=device)
    return TaskModel(spec, task, base)

"""A frozen base with adapters and a task: per-example losses, logits, and the parameters that train."""

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
from fedtune.model.layers import FrozenPrefix, OutputLayer, checkpoint_layers, layer_stack, without_adapters
from fedtune.model.spec import TaskModelSpec
from fedtune.tasks.base import Task
from fedtune.tasks.inputs import Row, input_of
from fedtune.tasks.registry import task_named


class TaskModel(nn.Module):
    """A frozen base, and the few tensors that are trained, noised, sent and saved.

    Every module is in evaluation mode for good, except those with trainable parameters of their own:
    dropout inside the base would change an example's gradient from pass to pass.

    Attributes:
        spec: what the model was built from.
        task: the task it learns.
        base: PEFT's wrapper around the base; call it for the base's own output.
        head: tensors of the task's own; None where it has none.
        output: the base's output layer, where it predicts tokens.
        round: the round being trained (`in_round`); 0 otherwise.
        decided_by: as `tasks.base.Model` has it.
    """

    head: nn.Module | None
    decided_by: torch.Tensor | None = None
    round: int = 0

    def __init__(self, spec: TaskModelSpec, task: Task, base: PeftModel) -> None:
        super().__init__()
        self.spec, self.task, self.base = spec, task, base
        self.head = None
        task.add_head(self)
        self.output = OutputLayer(base.get_base_model()) if task.predicts_tokens else None
        self._prefix = FrozenPrefix(layer_stack(base.get_base_model())[1])
        self.train()

    def logits(self, batch: Batch) -> torch.Tensor:
        """The task's float32 scores; the first axis is the row, or the example."""
        with self._prefix.given(batch.prefix):
            return self.task.logits(self, batch)

    def losses(self, batch: Batch) -> torch.Tensor:
        """Each example's own loss, (examples,) float32; nothing runs for an empty batch.

        A loss depends on its example alone, so that clipping bounds what an example can do: a mean over
        the batch's tokens would let one example's length rescale the gradients of the others.
        """
        if len(batch.input_ids) == 0:
            return torch.zeros(0, device=self.device, requires_grad=torch.is_grad_enabled())
        batch = self._with_reference(batch)
        with self._prefix.given(batch.prefix):
            return self.task.losses(self, batch)[: len(batch)]

    def figures(self, batch: Batch) -> dict[str, torch.Tensor]:
        """As `Task.figures`."""
        batch = self._with_reference(batch)
        with self._prefix.given(batch.prefix):
            return self.task.figures(self, batch)

    def reference(self, batch: Batch) -> torch.Tensor | None:
        """The task's reference for each example, (places, ...), by the base without adapters, whatever the adapter.

        A batch that carries it as `reference` skips that second pass.  None: the task has no reference.
        """
        if not self.task.has_reference:
            return None
        with torch.no_grad(), self._prefix.given(batch.prefix), without_adapters(self.base):
            return self.task.reference(self, batch)

    def _with_reference(self, batch: Batch) -> Batch:
        if not self.task.has_reference or batch.reference is not None:
            return batch
        return replace(batch, reference=self.reference(batch))

    def frozen_states(self, batch: Batch) -> torch.Tensor | None:
        """The output of the layers below the first trained one, (n, t, h); it does not depend on the adapter.

        A batch that carries it as `prefix` skips those layers.  None when there are none to skip.
        """
        return self._prefix.states(lambda: input_of(self.spec).pooled(self.base, batch.input_ids, batch.attention_mask))

    def train(self, mode: bool = True) -> TaskModel:
        """Set training mode for the modules with trainable parameters of their own, evaluation mode elsewhere."""
        super().train(False)
        for module in self.modules():
            if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
                module.train(mode)
        return self

    @property
    def skips_layers(self) -> bool:
        """Layers lie below the first trained one, whose output can be kept."""
        return self._prefix.depth > 0

    @property
    def device(self) -> torch.device:
        """The device that holds the model."""
        return next(chain(self.parameters(), self.buffers())).device

    @property
    def num_ids(self) -> int:
        """Token ids that the base has an embedding for, from 0."""
        return input_of(self.spec).num_ids(self.base)

    def made_up(self, lengths: Sequence[int], draws: np.random.Generator) -> tuple[Row, ...]:
        """Invented inputs of these lengths, on which the model is tried."""
        return input_of(self.spec).made_up(self.base, lengths, draws)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """All adapter and head tensors by their public name, in the order of the names; frozen ones too.

        Names are PEFT's own in a saved adapter ("base_model.model....lora_A.weight"), "....scales.offset" of what
        scales (`fedtune.model.ia3_and_dora`), and "head.weight".
        """
        named = {
            name.removeprefix("base.").replace(".default.", "."): parameter
            for name, parameter in self.named_parameters()
            if name.startswith("head.") or any(part in name for part in (".lora_A.", ".lora_B.", ".scales."))
        }
        return dict(sorted(named.items()))

    def trainable(self) -> dict[str, nn.Parameter]:
        """The tensors that are trained and released, in the order of their names, also those that rest now."""
        rests = self.spec.lora.rests_in(self.round) if self.round else None
        parameters = self.adapter_parameters().items()
        return {name: one for name, one in parameters if one.requires_grad or (rests and rests in name)}

    def trained_now(self) -> dict[str, nn.Parameter]:
        """The tensors that are clipped, noised and stepped: all trained ones, unless A and B take turns."""
        return {name: one for name, one in self.adapter_parameters().items() if one.requires_grad}

    @contextmanager
    def in_round(self, round: int) -> Iterator[None]:
        """Freeze the tensors that rest in this round (counted from 1) while the block runs."""
        rests = self.spec.lora.rests_in(round)
        resting = [one for name, one in self.trainable().items() if rests and rests in name]
        self.round = round
        try:
            for parameter in resting:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in resting:
                parameter.requires_grad_(True)
            self.round = 0

    def enable_gradient_checkpointing(self) -> None:
        """Store only the layers' inputs in the forward pass: less memory, about a third more time.

        Losses and per-example gradients stay the same.

        Raises:
            ConfigError: for `runtime.gradient_checkpointing`, in the first training pass, when the base's layers
                depend on each other by more than what one hands to the next.
        """
        checkpoint_layers(layer_stack(self.base.get_base_model())[1])


def build_task_model(spec: TaskModelSpec, *, device: torch.device | str = "cpu") -> TaskModel:
    """Load the base, attach adapters that change nothing yet, and start the head.

    ConfigError where the base cannot be had, or does not suit the task, the adapters or per-example clipping.
    """
    model = assemble(spec, device=device)
    model.task.start_head(model)
    return model


def assemble(spec: TaskModelSpec, *, device: torch.device | str) -> TaskModel:
    """The model with a head that is yet to be started, checked to keep examples apart."""
    task = task_named(spec.task, spec.task_settings)
    task.check_spec(spec)
    check = partial(task.check_base, path=spec.model.path)
    base = input_of(spec).base(spec, predicts_tokens=task.predicts_tokens, check=check, device=device)
    return TaskModel(spec, task, base)

"""A frozen base with adapters and a task: per-example losses, logits, and the parameters that train."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional

from fedtune.model.base import load_base, load_tokenizer
from fedtune.model.checkpointing import checkpoint_layers
from fedtune.model.fits import check_tokenizer_fits
from fedtune.model.heads import label_embeddings, label_texts, mean_pooled, new_head
from fedtune.model.lora import attach_lora, layer_stack
from fedtune.model.prefix import FrozenPrefix
from fedtune.model.probe import check_causal, check_examples_apart
from fedtune.model.spec import TaskModelSpec

_UNSUPERVISED = -100
_HEAD_ROWS = 32
"""Embeddings are filled up to a multiple of so many rows before they are scored."""


class Batch(Protocol):
    """n examples, padded to t tokens.

    Attributes:
        input_ids: (n, t) int64.
        attention_mask: (n, t) int64, 1 for real tokens.
        targets: int64; (n,) class numbers, or (n, t) token ids at their own places (not shifted), with
            -100 where a token is not supervised.
        prefix: (n, t, h) what `TaskModel.frozen_states` gave for these examples, or None.
        empty_rows: the last rows, which hold no example.
    """

    @property
    def input_ids(self) -> torch.Tensor: ...
    @property
    def attention_mask(self) -> torch.Tensor: ...
    @property
    def targets(self) -> torch.Tensor: ...
    @property
    def prefix(self) -> torch.Tensor | None: ...
    @property
    def empty_rows(self) -> int: ...


class TaskModel(nn.Module, ABC):
    """A base that stays as it is, and the few tensors that are trained, noised, sent and saved.

    Every module is in evaluation mode for good, except those with trainable parameters of their own:
    dropout inside the base would change an example's gradient from pass to pass, and hooks for
    per-example gradients look only at modules in training mode.

    Attributes:
        spec: what the model was built from.
        base: PEFT's wrapper around the base; call it for the base's own output.
    """

    def __init__(self, spec: TaskModelSpec, base: PeftModel) -> None:
        super().__init__()
        self.spec = spec
        self.base = base
        self._prefix = FrozenPrefix(layer_stack(base.get_base_model())[1])

    def logits(self, batch: Batch) -> torch.Tensor:
        """Float32 scores: (n, labels), or (n, t, vocabulary) for the token after each place."""
        with self._prefix.given(batch.prefix):
            return self._logits(batch)

    def losses(self, batch: Batch) -> torch.Tensor:
        """Each example's own loss, (examples,) float32; nothing runs for an empty batch.

        A loss depends on its example alone, so that clipping bounds what an example can do: a mean over
        the batch's tokens would let one example's length rescale the gradients of the others.
        """
        if len(batch.input_ids) == 0:
            return torch.zeros(0, device=self.device, requires_grad=torch.is_grad_enabled())
        with self._prefix.given(batch.prefix):
            losses = self._losses(batch)
        return losses[: len(losses) - batch.empty_rows]

    def frozen_states(self, batch: Batch) -> torch.Tensor | None:
        """What the layers below the first trained one make of each example, (n, t, h), whatever the adapter.

        A batch that carries it as `prefix` skips those layers.  None when there are none to skip.
        """
        return self._prefix.states(lambda: self.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask))

    @abstractmethod
    def _logits(self, batch: Batch) -> torch.Tensor: ...

    @abstractmethod
    def _losses(self, batch: Batch) -> torch.Tensor: ...

    def forward(self, batch: Batch) -> torch.Tensor:
        """The losses."""
        return self.losses(batch)

    def train(self, mode: bool = True) -> TaskModel:
        """Set training mode for the modules with trainable parameters of their own, evaluation mode elsewhere."""
        super().train(False)
        for module in self.modules():
            if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
                module.train(mode)
        return self

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.parameters()).device

    @property
    def num_ids(self) -> int:
        """Token ids that the base has an embedding for, from 0."""
        return int(self.base.get_base_model().get_input_embeddings().weight.shape[0])

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """All adapter and head tensors by their public name, in the order of the names; frozen ones too.

        Names are PEFT's own in a saved adapter ("base_model.model....lora_A.weight"), and "head.weight".
        """
        named = {
            name.removeprefix("base.").replace(".default.", "."): parameter
            for name, parameter in self.named_parameters()
            if ".lora_" in name or name.startswith("head.")
        }
        return dict(sorted(named.items()))

    def trainable(self) -> dict[str, nn.Parameter]:
        """The tensors that are clipped, noised, stepped and released, in the order of their names."""
        return {name: parameter for name, parameter in self.adapter_parameters().items() if parameter.requires_grad}

    def enable_gradient_checkpointing(self) -> None:
        """Store only the layers' inputs in the forward pass: less memory, about a third more time.

        Losses and per-example gradients stay the same.

        Raises:
            ConfigError: for `runtime.gradient_checkpointing`, in the first training pass, when the base's layers
                depend on each other by more than what one hands to the next.
        """
        _, layers = layer_stack(self.base.get_base_model())
        checkpoint_layers(layers)


class ClassificationModel(TaskModel):
    """Mean-pooled, normalised hidden states x; logits = scale * W x; the loss is their cross-entropy."""

    centre: torch.Tensor

    def __init__(self, spec: TaskModelSpec, base: PeftModel) -> None:
        super().__init__(spec, base)
        hidden_size = base.config.get_text_config().hidden_size
        self.head = new_head(
            spec.head, hidden_size=hidden_size, num_labels=len(spec.labels), device=next(base.parameters()).device
        )
        # A public constant, not trained and never part of an update.
        self.register_buffer("centre", torch.zeros(hidden_size, device=self.head.weight.device), persistent=False)
        self.train()

    def _logits(self, batch: Batch) -> torch.Tensor:
        embeddings = self.embed(batch.input_ids, batch.attention_mask)
        # A product with few rows takes another kernel, which rounds otherwise (measured below 13 rows on a CPU).
        rows = functional.pad(embeddings, (0, 0, 0, -len(embeddings) % _HEAD_ROWS))
        scores: torch.Tensor = self.head(rows)[: len(embeddings)]
        return self.spec.head.scale * scores

    def _losses(self, batch: Batch) -> torch.Tensor:
        return functional.cross_entropy(self._logits(batch), batch.targets, reduction="none")

    def embed(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Token ids and attention mask, both (n, t), to embeddings (n, h) of norm 1 in float32."""
        hidden = self.base(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        pooled = mean_pooled(hidden, attention_mask)
        return functional.normalize(pooled - self.centre, dim=-1) if self.spec.head.centre else pooled

    def start_from_labels(self) -> None:
        """Take from the labels' texts what `spec.head` wants of them: the centre, and each row of the head."""
        spec = self.spec.head
        if not spec.centre and spec.init != "label_names":
            return
        texts = label_texts(spec, self.spec.labels)
        tokenizer = load_tokenizer(self.spec.model)
        check_tokenizer_fits(tokenizer, self.base.get_base_model(), path=self.spec.model.path)
        rows = label_embeddings(texts, embed=self.embed, tokenizer=tokenizer, device=self.device)
        if spec.centre:
            self.centre.copy_(rows.mean(dim=0))
            rows = functional.normalize(rows - self.centre, dim=-1)
        if spec.init == "label_names":
            with torch.no_grad():
                self.head.weight.copy_(rows)


class CausalLMModel(TaskModel):
    """Next-token prediction; the loss is the mean over an example's own supervised tokens, zero when it has none."""

    def __init__(self, spec: TaskModelSpec, base: PeftModel) -> None:
        super().__init__(spec, base)
        self.train()

    def _logits(self, batch: Batch) -> torch.Tensor:
        logits: torch.Tensor = self.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return logits.float()

    def _losses(self, batch: Batch) -> torch.Tensor:
        wanted = batch.targets[:, 1:]
        supervised = wanted != _UNSUPERVISED
        # At every place but the last: to leave out those that no example needs would let neighbours choose the shape.
        places = torch.arange(wanted.shape[1], device=wanted.device)
        output = self.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=places)
        token_losses = functional.cross_entropy(
            output.logits.float().flatten(0, 1), wanted.flatten(), ignore_index=_UNSUPERVISED, reduction="none"
        ).view(wanted.shape)
        return token_losses.sum(dim=1) / supervised.sum(dim=1).clamp(min=1)


def build_task_model(spec: TaskModelSpec, *, device: torch.device | str = "cpu") -> TaskModel:
    """Load the base, attach adapters that change nothing yet, and start the head.

    Raises:
        ConfigError: when the base cannot be had, or does not suit the task, the adapters or per-example clipping.
    """
    model = assemble(spec, device=device)
    if isinstance(model, ClassificationModel):
        model.start_from_labels()
    return model


def assemble(spec: TaskModelSpec, *, device: torch.device | str) -> TaskModel:
    """The model with a head of zeros, checked to keep examples apart."""
    frozen = load_base(spec.model, task=spec.task, device=device)
    if spec.task == "causal_lm":
        check_causal(frozen, path=spec.model.path)
    base = attach_lora(frozen, spec=spec.lora, task=spec.task, seed=spec.seed)
    check_examples_apart(base)
    return ClassificationModel(spec, base) if spec.task == "classification" else CausalLMModel(spec, base)

"""Per-example gradients of a batch, by Opacus's hooks on the unwrapped model; `dp_step.py` clips and adds them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce

import torch
from opacus.grad_sample import GradSampleHooks, register_grad_sampler

from fedtune.data.batching import Batch, one_at_a_time
from fedtune.model.scales import Scales
from fedtune.spec import ConfigError, panics_as_errors
from fedtune.tasks import TaskModel

log = logging.getLogger(__name__)


class PerExampleGradients:
    """Gradients of one example each, while the hooks are attached (see `attached`)."""

    def __init__(self, model: TaskModel) -> None:
        self._model = model
        self._parameters = model.trainable()

    def of(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Gradients of each example's own loss: name -> (places, *parameter shape), float32; empty places are zero.

        Losses are summed, never averaged, over the batch: a mean would let one example rescale another.

        An example that makes the pass fail counts as zero, and the others as they would beside any other one; the
        answer of a site must not depend on whether some record can be computed.  Where the machine fails, and not an
        example, the failure is raised.

        Raises:
            ConfigError: a trainable tensor took no part in the forward pass.
        """
        try:
            with panics_as_errors():
                return _without_unknown(batch, self.of_all(batch))
        except ConfigError:
            raise
        except Exception:
            log.exception("a micro-batch failed; its examples are tried one at a time")
        nothing, each = one_at_a_time(self.of_all, batch, after_failure=lambda: _forget_unfinished_pass(self._model))
        gradients = {name: zeros.clone() for name, zeros in nothing.items()}
        for row, found in enumerate(each):
            for name, gradient in (found or {}).items():
                gradients[name][row] = gradient[0]
        return _without_unknown(batch, gradients)

    def of_all(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The same, where an example that makes the pass fail raises.

        Raises:
            ConfigError: a trainable tensor took no part in the forward pass.
        """
        self._clear()
        self._model.losses(batch).sum().backward()  # type: ignore[no-untyped-call]
        gradients = {}
        for name, parameter in self._parameters.items():
            gradient = getattr(parameter, "grad_sample", None)
            if gradient is None:
                raise ConfigError("lora.target_modules", name, "is trainable, but the forward pass does not use it")
            of_rows = gradient[: len(batch.input_ids)]  # a head may have worked on more rows
            # One after the other: torch's own sum over them could go by how many examples there are.
            gradients[name] = reduce(torch.add, (of_rows[text :: batch.texts] for text in range(batch.texts)))
        self._clear()
        return gradients

    def _clear(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]


@register_grad_sampler(Scales)  # type: ignore[untyped-decorator]
def _of_scales(
    layer: Scales, activations: list[torch.Tensor], backprops: torch.Tensor
) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Of values x, (n, t, k), times 1 + offset: the sum of x and their output's gradient over an example's tokens."""
    return {layer.offset: _added_tokens(backprops * activations[0])}


def _added_tokens(values: torch.Tensor) -> torch.Tensor:
    """(n, k) of (n, t, k), added half to half: torch's own sum could go by how many examples there are."""
    while (length := values.shape[1]) > 1:
        half = length // 2
        odd_one = values[:, 2 * half :]
        values = torch.cat([values[:, :half] + values[:, half : 2 * half], odd_one], dim=1)
    return values[:, 0]


def _without_unknown(batch: Batch, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gradients, zero for an example without states of the frozen layers: it counts as it does where none are kept.

    So does one of whose texts any has none.  Its own states alone decide that: no other example's gradient changes.
    """
    if batch.prefix is None:
        return gradients
    known = batch.prefix.flatten(1).any(dim=1).view(-1, batch.texts).all(dim=1)
    if known[: len(batch)].all():
        return gradients
    return {name: torch.where(known.view(-1, *[1] * (one.dim() - 1)), one, 0.0) for name, one in gradients.items()}


@contextmanager
def attached(model: TaskModel) -> Iterator[PerExampleGradients]:
    """Attach the hooks to `model` and remove them at the end, whatever happens."""
    hooks = GradSampleHooks(model, loss_reduction="sum")
    try:
        with warnings.catch_warnings():
            # The first adapted layer's inputs come from frozen layers; its hooks need only its outputs' gradients.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield PerExampleGradients(model)
    finally:
        hooks.cleanup()
        _forget_unfinished_pass(model)


def _forget_unfinished_pass(model: TaskModel) -> None:
    """Drop what a pass that failed half-way left behind, which Opacus's clean-up keeps.

    Inputs of the records would stay in memory, the failed batch's size would be taken for the next batch's, and a
    count of forward passes that never comes back to zero would withhold every later gradient; so that one failure would
    end every later round of every site that shares the model.
    """
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if any(parameter.requires_grad for parameter in own):
            for name in ("activations", "max_batch_len"):
                vars(module).pop(name, None)
            for parameter in own:
                kept = vars(parameter)
                for name in ("_current_grad_sample", "grad_sample"):
                    kept.pop(name, None)
                if "_forward_counter" in kept:  # there as long as the hooks are
                    kept["_forward_counter"] = 0
                parameter.grad = None

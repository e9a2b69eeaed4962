"""One step of DP-SGD, written like Algorithm 1 of Abadi et al. 2016 (arXiv 1607.00133).

Sample, clip each, sum, noise, divide, step.  Read together with `fedtune.privacy.mechanism`, this file is the whole
argument that one step is one `PoissonSampledDpEvent(rate, GaussianDpEvent(noise_multiplier))`.

What is sampled and clipped is a privacy unit: a record, with the gradient of its own loss; or a user, with the mean of
the gradients of its records (`fedtune.training.users`).  Nothing here knows which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from fedtune.data import Batch
from fedtune.privacy.mechanism import add_gaussian_noise, poisson_sample
from fedtune.privacy.plan import Plan
from fedtune.privacy.randomness import RandomStream
from fedtune.training.users import UserBatch

Sums = dict[str, torch.Tensor]

# Clipping aims this far below the clip norm, so that float32 rounding never lifts a contribution above it.
_ROUNDING_ROOM = 1e-6
# Above this norm the factor that clips it could leave float32's normal range, and rounding could exceed the room.
_LARGEST_NORM = 1e30


class UnitGradients(Protocol):
    """Turns a micro-batch of n units into one gradient for each: name -> (n, *parameter shape)."""

    def of(self, batch: Any, /) -> dict[str, torch.Tensor]:
        """The gradients; each depends on its own unit alone."""
        ...


@dataclass(frozen=True, kw_only=True)
class Records:
    """One site's training records, as a step sees them: in privacy units.

    Attributes:
        count: how many units there are; never leaves the site.
        declared_size: the number the site publishes, in the step's denominator.
        cut: turns the indices of a logical batch into micro-batches.  How it cuts changes no result.
    """

    count: int
    declared_size: int
    cut: Callable[[npt.NDArray[np.int64]], Iterable[Batch | UserBatch]]


def dp_sgd_step(
    gradients: UnitGradients,
    records: Records,
    plan: Plan,
    *,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    sampling: RandomStream,
    noise: RandomStream,
) -> None:
    """Take one private step on `parameters`.

    Guarantee: what the step changes depends on the records only through one Gaussian mechanism with standard deviation
    `noise_multiplier * max_grad_norm` on a Poisson sample's sum of vectors whose joint L2 norm over all trainable
    tensors is at most `max_grad_norm`, one vector a unit.  The denominator is public.  An empty sample adds noise like
    any other.  One more record also moves the others' terms by rounding, since it changes how the batch is cut: by
    less than 1e-5 of the clip norm a record in float32 (docs/threat_model.md has the measured figures).
    """
    assert_one_tensor_set(parameters, optimizer)
    sampled = poisson_sample(records.count, plan.sampling_rate, sampling)
    sums = zeros(parameters)
    seen = 0
    for batch in records.cut(sampled):
        add_clipped(sums, gradients.of(batch), plan.max_grad_norm)
        seen += len(batch)
    assert seen == len(sampled), "each sampled record counts exactly once"
    noisy = add_gaussian_noise(
        {name: total.cpu().numpy() for name, total in sums.items()},
        noise_multiplier=plan.noise_multiplier,
        max_grad_norm=plan.max_grad_norm,
        stream=noise,
    )
    descend(noisy, parameters, optimizer, denominator=plan.sampling_rate * records.declared_size)


def zeros(parameters: Mapping[str, torch.nn.Parameter]) -> Sums:
    """Float64 accumulators in the parameters' shapes: the order of adding then changes nothing that float32 shows."""
    return {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}


def add_clipped(sums: Sums, gradients: Mapping[str, torch.Tensor], max_grad_norm: float) -> None:
    """Scale each unit's gradient to a joint L2 norm of at most `max_grad_norm` and add it to `sums`.

    Args:
        sums: name -> (*shape), changed in place.
        gradients: name -> (n, *shape), the same names as `sums`; n examples, or n users' means.
        max_grad_norm: the clip norm C, over all tensors of a unit together.

    Guarantee: what one unit adds has a joint L2 norm of at most `max_grad_norm`.  Norms and sums are in float64:
    a float32 norm of 60,000 like values was measured 1.6e-5 too small, which lets a contribution exceed the bound.
    A unit whose gradient is not finite, or has a norm above 1e30, counts as zero.
    """
    assert sums.keys() == gradients.keys(), "clipped tensors and summed tensors differ"
    flat = {name: gradient.flatten(1).float() for name, gradient in gradients.items()}
    each = [torch.linalg.vector_norm(gradient, dim=1, dtype=torch.float64) for gradient in flat.values()]
    norms = torch.stack(each, dim=1).norm(dim=1)  # (n,)
    usable = norms <= _LARGEST_NORM  # false for infinity and for NaN
    bound = max_grad_norm * (1 - _ROUNDING_ROOM)
    weights = torch.where(usable, bound / norms.clamp(min=bound), torch.zeros_like(norms))
    all_usable = bool(usable.all())
    for name, gradient in flat.items():
        kept = gradient if all_usable else torch.where(usable[:, None], gradient, torch.zeros_like(gradient))
        sums[name] += (weights @ kept.double()).reshape(sums[name].shape)


def descend(
    gradient_sum: Mapping[str, npt.NDArray[np.float64]],
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    denominator: float,
) -> None:
    """Divide by the public denominator and let the optimizer step: post-processing of the noisy sum."""
    for name, parameter in parameters.items():
        mean = torch.from_numpy(gradient_sum[name] / denominator)
        parameter.grad = mean.to(device=parameter.device, dtype=parameter.dtype)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def assert_one_tensor_set(parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """The tensors clipped, noised and stepped are one identical set."""
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert stepped == {id(p) for p in parameters.values()}, "stepped tensors and clipped tensors differ"

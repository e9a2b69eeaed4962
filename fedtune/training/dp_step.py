"""One step of DP-SGD, written like Algorithm 1 of Abadi et al. 2016 (arXiv 1607.00133).

Sample, clip each, sum, noise, divide, step.  Read together with `fedtune.privacy.mechanism`, this file is the whole
argument that one step is one `PoissonSampledDpEvent(rate, GaussianDpEvent(noise_multiplier))`.

This file samples and clips privacy units.  A unit is a record, with the gradient of its own loss, or a user, with the
mean of its records' gradients.  `Records` and `UnitGradients` hide which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedtune.privacy.mechanism import GRID_BITS, add_gaussian_noise, cell, poisson_sample
from fedtune.privacy.randomness import RandomStream
from fedtune.privacy.run_plan import Plan

TensorSums = dict[str, torch.Tensor]

SMALLEST_NORM = 1e-3
"""Gradients are scaled as if their norm were at least this: below it they may be mostly rounding, and a tiny clip norm
would blow that up to a whole contribution (measured in simulations/sensitivity)."""
# Clipping aims this far below the clip norm, so that rounding never lifts a contribution above it.
_ROUNDING_ROOM = 1e-6
CLIP_NORM_CELLS = 2.0**GRID_BITS  # a clip norm, in cells
_LANES = 1024  # in which an accelerator adds up a row's squares: a power of two


def nobody_else(sums: TensorSums, max_grad_norm: float) -> int:
    """Add nothing: a site with one device has no others."""
    return 0


class UnitGradients(Protocol):
    """Turns a micro-batch of n units into one gradient for each: name -> (n, *parameter shape)."""

    def of(self, batch: Any, /) -> dict[str, torch.Tensor]:
        """The gradients; each depends on its own unit alone, bit for bit.  Rows without a unit are zero."""
        ...


@dataclass(frozen=True, kw_only=True)
class Records:
    """One site's training records, as a step sees them: in privacy units."""

    count: int  # how many units there are; never leaves the site
    declared_size: int  # the number the site publishes, in the step's denominator
    # turns the indices of a logical batch into micro-batches, whose lengths are their numbers of units.  How it
    # cuts changes no bit of a sum.
    cut: Callable[[npt.NDArray[np.int64]], Iterable[Any]]
    # adds the other devices' sums over the units that `cut` left to them, clipped to the same norm; returns the
    # number of those units
    add_others: Callable[[TensorSums, float], int] = nobody_else


def dp_sgd_step(
    gradients: UnitGradients,
    records: Records,
    plan: Plan,
    *,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    sampling: RandomStream,
    noise: RandomStream,
) -> None:
    """Take one private step on `parameters`.

    Guarantee: what the step changes depends on the records only through one Gaussian mechanism with standard deviation
    `noise_multiplier * max_grad_norm` on a Poisson sample's sum of vectors whose joint L2 norm over all trainable
    tensors is at most `max_grad_norm`, one vector a unit.  This is exact: each vector depends on its own unit alone,
    bit for bit (`fedtune.training.preflight` tests that on the current machine), and is a vector of integers whose norm
    is checked in integers; sums and noise are integers too.  The denominator is public.  An empty sample
    adds noise like any other.
    """
    assert_one_tensor_set(parameters, optimizer)
    sums = sampled_sum(gradients, records, plan, parameters=parameters, sampling=sampling)
    noisy = add_gaussian_noise(sums, noise_multiplier=plan.noise_multiplier, stream=noise)
    cells_in_denominator = plan.sampling_rate * records.declared_size / cell(plan.max_grad_norm)
    descend(noisy, parameters, optimizer, denominator=cells_in_denominator)


def sampled_sum(
    gradients: UnitGradients,
    records: Records,
    plan: Plan,
    *,
    parameters: Mapping[str, nn.Parameter],
    sampling: RandomStream,
) -> dict[str, npt.NDArray[np.int64]]:
    """The sum of a Poisson sample's clipped gradients, in cells, with no noise yet: it must not leave the caller.

    Guarantee: one unit more or less moves it, in each outcome of the sampling, by a vector of L2 norm at most
    `plan.max_grad_norm`, or not at all.
    """
    sampled = poisson_sample(records.count, plan.sampling_rate, sampling)
    sums = zeros(parameters)
    seen = add_each(sums, gradients, records.cut(sampled), plan.max_grad_norm)
    seen += records.add_others(sums, plan.max_grad_norm)
    assert seen == len(sampled), "each sampled unit counts exactly once"
    return {name: total.cpu().numpy() for name, total in sums.items()}


def zeros(parameters: Mapping[str, nn.Parameter]) -> TensorSums:
    """Zero sums in the parameters' shapes; integers, so that the order of adding changes nothing."""
    return {name: torch.zeros_like(p, dtype=torch.int64) for name, p in parameters.items()}


def add_each(sums: TensorSums, gradients: UnitGradients, batches: Iterable[Any], max_grad_norm: float) -> int:
    """Add what each unit of the micro-batches contributes, as `add_clipped` does; returns how many units they have."""
    seen = 0
    for batch in batches:
        add_clipped(sums, gradients.of(batch), max_grad_norm)
        seen += len(batch)
    return seen


def add_clipped(sums: TensorSums, gradients: Mapping[str, torch.Tensor], max_grad_norm: float) -> None:
    """Scale each unit's gradient to a joint L2 norm of at most `max_grad_norm`, round it and add it to `sums`.

    Args:
        sums: name -> (*shape) int64 in cells of the grid (`mechanism.cell`), changed in place.
        gradients: name -> (n, *shape), the same names as `sums`; n examples, or n users' means.
        max_grad_norm: the clip norm C, over all tensors of a unit together.

    Guarantee: one unit adds a vector of integers with a joint L2 norm of at most C, which is 2**24 cells.  Floats scale
    it, and integers check it.  A unit counts as zero if its gradient is not finite, or if its rounded vector is longer
    than C after all.
    """
    assert sums.keys() == gradients.keys(), "clipped tensors and summed tensors differ"
    totals, squares = {}, []
    # One tensor at a time, so that its values stay in the cache.
    for name, contribution in _in_cells(gradients, max_grad_norm):
        # Exact in float64: fewer than 2**29 whole numbers of at most 2**24 each.
        totals[name] = contribution.sum(dim=0)
        squares.append(_exact_squares(contribution))
    if not (usable := _within_clip_norm(squares)).all():
        add_clipped(sums, {name: gradient[usable] for name, gradient in gradients.items()}, max_grad_norm)
        return
    for name, total in totals.items():
        sums[name] += total.to(torch.int64).reshape(sums[name].shape)


def contributions(gradients: Mapping[str, torch.Tensor], max_grad_norm: float) -> dict[str, torch.Tensor]:
    """The addend of each unit to a sum: name -> (n, values), whole numbers of cells in float64, where they are exact.

    Computed where the gradients are, as `add_clipped` does, and brought to the CPU one tensor at a time.
    """
    whole, squares = {}, []
    for name, contribution in _in_cells(gradients, max_grad_norm):
        squares.append(_exact_squares(contribution))
        whole[name] = contribution.cpu()
    usable = _within_clip_norm(squares).cpu()
    return {name: torch.where(usable[:, None], one, 0.0) for name, one in whole.items()}


def _in_cells(gradients: Mapping[str, torch.Tensor], max_grad_norm: float) -> Iterator[tuple[str, torch.Tensor]]:
    """Each name with (n, values): a unit's gradient g as g * C / max(|g|, C, `SMALLEST_NORM`), rounded towards zero.

    In cells, in float64.  A row depends on its own unit alone, bit for bit.  It may still be NaN.
    """
    bound = max_grad_norm * (1 - _ROUNDING_ROOM)
    cells = _norms(gradients).clamp(min=max(bound, SMALLEST_NORM))[:, None] * (cell(max_grad_norm) / bound)
    for name, gradient in gradients.items():
        yield name, _rows(gradient).div_(cells, rounding_mode="trunc")


def _norms(gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(n,) joint L2 norms over all tensors."""
    return _added(_squares_of_rows(_rows(gradient)) for gradient in gradients.values()).sqrt()


def _rows(gradient: torch.Tensor) -> torch.Tensor:
    """(n, values) in float64, since a float32 norm of 60,000 like values was measured 1.6e-5 too small.

    Contiguous, because another memory layout is summed in another order, and the layout depends on the batch.
    """
    return gradient.flatten(1).to(torch.float64, copy=True, memory_format=torch.contiguous_format)


def _exact_squares(whole: torch.Tensor) -> torch.Tensor:
    """(n, lanes) squared norms of rows of integers.

    A usable row has at most 2**48, so float64 sums it exactly, and the square of a root of that rounds back to it.
    """
    return _squares_of_rows(whole).round()


def _within_clip_norm(squares: Iterable[torch.Tensor]) -> torch.Tensor:
    """(n,) whether each unit may be added, by the squared norms (n, lanes) of its tensors; false for NaN."""
    return _added(squares) <= CLIP_NORM_CELLS**2


def _added(each: Iterable[torch.Tensor]) -> torch.Tensor:
    """(n,) sums of tensors (n, lanes), one after the other: torch's own order of adding goes by how many there are."""
    return added_halves(reduce(torch.add, each))


def _squares_of_rows(values: torch.Tensor) -> torch.Tensor:
    """(n, lanes) squared L2 norms of n rows of float64, in parts; none depends on how many rows there are."""
    if values.device.type != "cpu":
        # An accelerator parts a row among its threads by how many rows there are.  Adding by element has one order.
        squares = nn.functional.pad(values.square(), (0, -values.shape[1] % _LANES))
        return added_halves(squares.view(len(values), squares.shape[1] // _LANES, _LANES))
    # torch divides a single row among its threads, which changes the order of adding; of several rows each has one.
    rows = values if len(values) > 1 else values.repeat(2, 1)
    norms: torch.Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return norms[: len(values)].square()


def added_halves(values: torch.Tensor) -> torch.Tensor:
    """(n, t, ...) to (n, ...), added half to half: the order in torch's own sum could depend on the number of rows.

    Here each element is a sum of two by IEEE's rules, whatever computes it, and no other row enters.
    """
    while (length := values.shape[1]) > 1:
        half = length // 2
        odd_one = values[:, 2 * half :]
        values = torch.cat([values[:, :half] + values[:, half : 2 * half], odd_one], dim=1)
    return values[:, 0]


def descend(
    gradient_sum: Mapping[str, npt.NDArray[np.int64]],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    denominator: float,
) -> None:
    """Divide by the public denominator, in cells, and let the optimizer step: post-processing of the noisy sum."""
    for name, parameter in parameters.items():
        mean = torch.from_numpy(gradient_sum[name] / denominator)
        parameter.grad = mean.to(device=parameter.device, dtype=parameter.dtype)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # a stale gradient must not reach the next step


def assert_one_tensor_set(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Assert that the tensors clipped, noised and stepped are one identical set."""
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert stepped == {id(p) for p in parameters.values()}, "stepped tensors and clipped tensors differ"

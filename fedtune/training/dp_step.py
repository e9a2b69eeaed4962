"""One step of DP-SGD, following Algorithm 1 of Abadi et al. 2016 (arXiv 1607.00133).

A step samples, clips, sums, adds noise, divides, and calls the optimizer. Together with `fedtune.privacy.mechanism`,
this file is the complete argument that one step is one `PoissonSampledDpEvent(rate,
GaussianDpEvent(noise_multiplier))`.

This file samples and clips privacy units. A unit is a record, with the gradient of its own loss, or a user, with the
mean gradient of the user's records. `Records` and `UnitGradients` hide the difference.
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

from fedtune.privacy.mechanism import (
    GRID_BITS,
    SumOnDevice,
    add_gaussian_noise,
    compute_cell_width,
    draw_poisson_sample,
)
from fedtune.privacy.randomness import RandomStream
from fedtune.privacy.run_plan import Plan
from fedtune.training.algorithms.local_algorithm import Arrays, NoisedGradient

TensorSums = dict[str, torch.Tensor]
Correction = Callable[[NoisedGradient], Arrays]
"""An algorithm's correction of a step's noised mean gradient, before the optimizer steps."""

SMALLEST_NORM = 1e-3
"""Lower limit on the gradient norm that clipping divides by. A smaller gradient may be mostly rounding error, which a
tiny clip norm would scale up to a full contribution (measured in simulations/sensitivity).
"""
# Clipping aims this far below the clip norm, so that rounding never lifts a contribution above it.
_ROUNDING_ROOM = 1e-6
CLIP_NORM_CELLS = 2.0**GRID_BITS  # a clip norm, in cells
_LANES = 1024  # in which an accelerator adds up a row's squares: a power of two


def add_nothing(sums: TensorSums, max_grad_norm: float) -> int:
    """Return 0 units without changing `sums`: the default of `Records.add_others`, for a site with one device."""
    return 0


class UnitGradients(Protocol):
    """Interface for the per-unit gradients of a micro-batch."""

    def compute_gradients(self, batch: Any, /) -> dict[str, torch.Tensor]:
        """Compute the gradients of the n units in `batch`: name -> (n, *parameter shape).

        Rows without a unit are zero. Each gradient depends on its own unit alone, bit for bit.
        """
        ...


def sum_batch(gradients: UnitGradients, batch: Any, max_grad_norm: float) -> TensorSums:
    """Sum the clipped contributions of a micro-batch's units: name -> (*shape) int64, in cells."""
    return sum_clipped(gradients.compute_gradients(batch), max_grad_norm)


SumBatch = Callable[[UnitGradients, Any, float], TensorSums]
"""`sum_batch`, or a replay of its kernels on an accelerator with equal bits (`fedtune.training.captured`)."""


@dataclass(frozen=True, kw_only=True)
class Records:
    """A site's training records as privacy units, for sampling and batching."""

    count: int  # number of units; never leaves the site
    declared_size: int  # the size that the site publishes, used in the step's denominator
    # cuts a logical batch, given by unit indices, into micro-batches, whose lengths are their numbers of units.
    # The sums are bit-identical for every way of cutting.
    cut: Callable[[npt.NDArray[np.int64]], Iterable[Any]]
    # adds the other devices' sums over their own units, clipped to the same norm; returns the number of these units
    add_others: Callable[[TensorSums, float], int] = add_nothing
    sum_batch: SumBatch = sum_batch


def take_dp_sgd_step(
    gradients: UnitGradients,
    records: Records,
    plan: Plan,
    *,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    sampling: RandomStream,
    noise: RandomStream,
    correct: Correction | None = None,
) -> None:
    """Take one DP-SGD step on `parameters`.

    Guarantee: the changes depend on the records only through one Gaussian mechanism with standard deviation
    `noise_multiplier * max_grad_norm` on a Poisson sample's sum of vectors, one per unit, whose joint L2 norm over all
    trainable tensors is at most `max_grad_norm`. The bound is exact: each vector depends on its own unit alone, bit
    for bit (`fedtune.training.batch_invariance` tests this on the current machine), and is a vector of integers whose
    norm is checked in integers; sums and noise are integers too. The denominator is public. An empty sample receives
    noise like any other sample.

    Args:
        gradients: computes the per-unit gradients of a micro-batch.
        records: the site's units.
        plan: the sampling rate, the clip norm and the noise multiplier.
        parameters: the trained tensors by name; exactly the tensors of `optimizer`.
        optimizer: steps along the noised mean gradient.
        sampling: the random stream of the Poisson sample.
        noise: the random stream of the noise.
        correct: the algorithm's correction of the noised gradient; None for no correction.
    """
    assert_same_tensors(parameters, optimizer)
    sums = sum_sampled_gradients(gradients, records, plan, parameters=parameters, sampling=sampling)
    noisy = add_gaussian_noise(sums, noise_multiplier=plan.noise_multiplier, stream=noise)
    cells_in_denominator = plan.sampling_rate * records.declared_size / compute_cell_width(plan.max_grad_norm)
    apply_gradient_sum(noisy, parameters, optimizer, denominator=cells_in_denominator, correct=correct)


def sum_sampled_gradients(
    gradients: UnitGradients,
    records: Records,
    plan: Plan,
    *,
    parameters: Mapping[str, nn.Parameter],
    sampling: RandomStream,
) -> dict[str, npt.NDArray[np.int64] | SumOnDevice]:
    """Sum the clipped gradients of a Poisson sample by name, in cells and without noise.

    The caller must not release the sum.

    Guarantee: adding or removing one unit changes the sum, for each outcome of the sampling, by a vector of L2 norm at
    most `plan.max_grad_norm`, or not at all.
    """
    sampled = draw_poisson_sample(records.count, plan.sampling_rate, sampling)
    sums = make_zero_sums(parameters)
    seen = add_batches(sums, gradients, records.cut(sampled), plan.max_grad_norm, records.sum_batch)
    seen += records.add_others(sums, plan.max_grad_norm)
    assert seen == len(sampled), "each sampled unit must be counted exactly once"
    return {name: total.numpy() if total.device.type == "cpu" else _OnDevice(total) for name, total in sums.items()}


@dataclass(frozen=True)
class _OnDevice:
    """A sum on its device (`mechanism.SumOnDevice`), so that the noise is drawn while the device still computes."""

    values: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def size(self) -> int:
        return self.values.numel()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[np.int64]:
        return self.values.cpu().numpy()


def make_zero_sums(parameters: Mapping[str, nn.Parameter]) -> TensorSums:
    """Create zero sums in the parameters' shapes, as int64, so that the order of addition does not matter."""
    return {name: torch.zeros_like(p, dtype=torch.int64) for name, p in parameters.items()}


def add_batches(
    sums: TensorSums,
    gradients: UnitGradients,
    batches: Iterable[Any],
    max_grad_norm: float,
    sum_batch: SumBatch = sum_batch,
) -> int:
    """Add the clipped contribution of each unit in the micro-batches to `sums`, and return the number of units."""
    seen = 0
    for batch in batches:
        _add_totals(sums, sum_batch(gradients, batch, max_grad_norm))
        seen += len(batch)
    return seen


def add_clipped(sums: TensorSums, gradients: Mapping[str, torch.Tensor], max_grad_norm: float) -> None:
    """Add the units' clipped gradients to `sums`: name -> (*shape) int64 in cells, changed in place (`sum_clipped`)."""
    _add_totals(sums, sum_clipped(gradients, max_grad_norm))


def _add_totals(sums: TensorSums, totals: TensorSums) -> None:
    assert sums.keys() == totals.keys(), "clipped tensors and summed tensors differ"
    for name, total in totals.items():
        sums[name] += total


def sum_clipped(gradients: Mapping[str, torch.Tensor], max_grad_norm: float) -> TensorSums:
    """Scale each unit's gradient to a joint L2 norm of at most `max_grad_norm`, round it, and sum over the units.

    Args:
        gradients: name -> (n, *shape); n examples, or the means of n users.
        max_grad_norm: the clip norm C, over all tensors of a unit together.

    Returns:
        name -> (*shape) int64 in cells of the grid (`mechanism.compute_cell_width`).

    Guarantee: one unit adds a vector of integers with a joint L2 norm of at most C, which is 2**24 cells. Scaling uses
    floats; the check uses integers. A unit counts as zero if its gradient is not finite, or if its rounded vector
    still exceeds C.
    """
    totals, squares = {}, []
    # One tensor at a time, so that its values stay in the cache.
    for name, contribution in _clip_to_cells(gradients, max_grad_norm):
        # Exact in float64: fewer than 2**29 whole numbers of at most 2**24 each.
        totals[name] = contribution.sum(dim=0)
        squares.append(_compute_exact_squared_norms(contribution))
    usable = _is_within_clip_norm(squares)
    # An accelerator always zeroes the unusable rows, because the process would have to wait for the answer otherwise.
    if usable.device.type != "cpu" or not usable.all():
        for name, contribution in _clip_to_cells(gradients, max_grad_norm):
            totals[name] = torch.where(usable[:, None], contribution, 0.0).sum(dim=0)
    return {name: totals[name].to(torch.int64).view(gradient.shape[1:]) for name, gradient in gradients.items()}


def compute_clipped_contributions(
    gradients: Mapping[str, torch.Tensor], max_grad_norm: float
) -> dict[str, torch.Tensor]:
    """Return each unit's contribution to a sum: name -> (n, values), as whole numbers of cells in float64.

    The contributions are computed on the gradients' device, as in `sum_clipped`, and copied to the CPU one tensor at a
    time.
    """
    whole, squares = {}, []
    for name, contribution in _clip_to_cells(gradients, max_grad_norm):
        squares.append(_compute_exact_squared_norms(contribution))
        whole[name] = contribution.cpu()
    usable = _is_within_clip_norm(squares).cpu()
    return {name: torch.where(usable[:, None], values, 0.0) for name, values in whole.items()}


def _clip_to_cells(gradients: Mapping[str, torch.Tensor], max_grad_norm: float) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, clipped gradients): (n, values) in float64, in cells of the grid, rounded towards zero.

    A unit's gradient g becomes g * C / max(|g|, C, `SMALLEST_NORM`). Each row depends on its own unit alone, bit for
    bit, and may still be NaN.
    """
    bound = max_grad_norm * (1 - _ROUNDING_ROOM)
    cells = _compute_joint_norms(gradients).clamp(min=max(bound, SMALLEST_NORM))[:, None] * (
        compute_cell_width(max_grad_norm) / bound
    )
    for name, gradient in gradients.items():
        yield name, _flatten_rows(gradient).div_(cells, rounding_mode="trunc")


def _compute_joint_norms(gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the (n,) joint L2 norms over all tensors."""
    return _sum_in_fixed_order(
        _compute_squared_row_norms(_flatten_rows(gradient)) for gradient in gradients.values()
    ).sqrt()


def _flatten_rows(gradient: torch.Tensor) -> torch.Tensor:
    """Flatten to (n, values) in float64, because in float32 a norm of 60,000 equal values was 1.6e-5 too small.

    The result is contiguous, because the order of summation follows the memory layout, which depends on the batch.
    """
    return gradient.flatten(1).to(torch.float64, copy=True, memory_format=torch.contiguous_format)


def _compute_exact_squared_norms(whole: torch.Tensor) -> torch.Tensor:
    """Return the (n, lanes) squared norms of rows of integers.

    A usable row has a squared norm of at most 2**48, so float64 sums it exactly. The square of the root, rounded, is
    the exact squared norm again.
    """
    return _compute_squared_row_norms(whole).round()


def _is_within_clip_norm(squares: Iterable[torch.Tensor]) -> torch.Tensor:
    """Check for each of n units whether its joint norm is within the clip norm; False for NaN.

    `squares` contains the (n, lanes) squared norms of each tensor.
    """
    return _sum_in_fixed_order(squares) <= CLIP_NORM_CELLS**2


def _sum_in_fixed_order(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Sum tensors (n, lanes) to (n,) in a fixed order, because torch's own order depends on the number of rows."""
    return sum_by_halves(reduce(torch.add, tensors))


def _compute_squared_row_norms(values: torch.Tensor) -> torch.Tensor:
    """Return the (n, lanes) partial squared L2 norms of n float64 rows, independent of the number of rows."""
    if values.device.type != "cpu":
        # An accelerator splits a row among its threads by the number of rows. Elementwise addition has a fixed order.
        squares = nn.functional.pad(values.square(), (0, -values.shape[1] % _LANES))
        return sum_by_halves(squares.view(len(values), squares.shape[1] // _LANES, _LANES))
    # torch splits a single row among its threads, which changes the order of addition; with several rows, it does not.
    rows = values if len(values) > 1 else values.repeat(2, 1)
    norms: torch.Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return norms[: len(values)].square()


def sum_by_halves(values: torch.Tensor) -> torch.Tensor:
    """Sum (n, t, ...) to (n, ...) by adding pairwise halves.

    The order of torch's own sum could depend on the number of rows.

    Each addition has two operands and follows IEEE 754 on any device, and each sum uses its own row only.
    """
    while (length := values.shape[1]) > 1:
        half = length // 2
        odd_one = values[:, 2 * half :]
        values = torch.cat([values[:, :half] + values[:, half : 2 * half], odd_one], dim=1)
    return values[:, 0]


def apply_gradient_sum(
    gradient_sum: Mapping[str, npt.NDArray[np.int64]],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    denominator: float,
    correct: Correction | None = None,
) -> None:
    """Divide the noised sum by the public denominator, and take the optimizer's step.

    Guarantee: post-processing of the noised sum.

    Args:
        gradient_sum: the noised sum by name, in cells.
        parameters: the trained tensors by name.
        optimizer: steps along the mean gradient.
        denominator: the public denominator, in cells.
        correct: the algorithm's correction of the mean gradient; None for no correction.
    """
    mean: Mapping[str, npt.NDArray[np.floating]] = {name: gradient_sum[name] / denominator for name in parameters}
    if correct is not None:
        mean = correct(NoisedGradient({name: value.astype(np.float32) for name, value in mean.items()}))
    for name, parameter in parameters.items():
        parameter.grad = torch.from_numpy(mean[name]).to(device=parameter.device, dtype=parameter.dtype)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # a stale gradient must not reach the next step


def assert_same_tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Assert that `optimizer` steps exactly the parameters that are clipped and noised."""
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert stepped == {id(p) for p in parameters.values()}, "stepped tensors and clipped tensors differ"

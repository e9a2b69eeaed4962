"""The passes over memory that surround an int8 product, each in one loop that numba compiles (the extra `fast`).

`int8` has the same two functions in torch's own operations, which pass over memory several times.  Both give the same
bits: a sum, a product, a quotient is rounded once, as IEEE 754 says, since numba neither contracts nor reorders unless
it is told to.  Used on CPUs with an int8 kernel of torch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit

_LARGEST, _SMALLEST = np.float32(127), np.float32(1e-30)
_NEAREST = np.float32(3 * 2**22)
"""Added and taken away, it rounds to the nearest whole number, ties to even: `rint`, but in vectors."""
_SIGN = np.int32(2**31 - 1)
_INFINITE = np.int32(0x7F800000)  # the bits of infinity: those of other numbers are less, of NaN more


def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    how: dict[str, Any] = {"error_model": "numpy", "nogil": True}
    try:
        return njit(cache=True, **how)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # there is no folder to keep it in from one process to the next
        return njit(**how)(function)  # type: ignore[no-any-return]


@_compiled
def _round(rows: Any, factors: Any, some: Any, bits: Any, whole: Any, scales: Any, of_scales: Any, part: int) -> None:
    for row in range(rows.shape[0]):
        for number in range(scales.shape[1]):
            first, end = number * part, min((number + 1) * part, rows.shape[1])
            # Slices, since a place that may count from the end is not looked up in vectors.
            given, times, numbers = rows[row, first:end], factors[first:end], whole[row, first:end]
            for place in range(end - first):
                some[place] = given[place] * times[place]
            largest = np.int32(0)
            for place in range(end - first):  # as whole numbers, which the bits of positive numbers order as these do
                largest = max(largest, bits[place] & _SIGN)
            of_scales[row, number] = largest
            if largest >= _INFINITE:
                scales[row, number] = np.float32(np.nan)
                numbers[:] = 0
                continue
            scale = max(scales[row, number], _SMALLEST) / _LARGEST
            scales[row, number] = scale
            for place in range(end - first):
                numbers[place] = np.int8(np.int32((some[place] / scale + _NEAREST) - _NEAREST))


@_compiled
def _scale(out: Any, sums: Any, of_rows: Any, of_columns: Any, bias: Any) -> None:
    for row in range(out.shape[0]):
        for place in range(out.shape[1]):
            out[row, place] = np.float32(sums[row, place]) * of_rows[row] * of_columns[place] + bias[place]


@_compiled
def _add(out: Any, sums: Any, of_rows: Any, of_columns: Any) -> None:
    for row in range(out.shape[0]):
        for place in range(out.shape[1]):
            out[row, place] = np.float32(sums[row, place]) * of_rows[row] * of_columns[place] + out[row, place]


def round_into(rows: torch.Tensor, factors: torch.Tensor, whole: torch.Tensor, scales: torch.Tensor, part: int) -> None:
    """As `int8.round_into`."""
    some, of_rows = np.empty(part, dtype=np.float32), scales.numpy()
    bits = some.view(np.int32), of_rows.view(np.int32)
    _round(rows.contiguous().numpy(), factors.numpy(), some, bits[0], whole.numpy(), of_rows, bits[1], part)


def scale_into(
    out: torch.Tensor, sums: torch.Tensor, of_rows: torch.Tensor, of_columns: torch.Tensor, plus: torch.Tensor | None
) -> None:
    """As `int8.scale_into`; `plus` is `out` itself, or (m,)."""
    about = out.numpy(), sums.numpy(), of_rows.contiguous().numpy(), of_columns.numpy()
    if plus is out:
        _add(*about)
    else:
        # Minus zero changes no number, not even plus zero and minus zero themselves.
        minus_zero = np.full(len(of_columns), -0.0, dtype=np.float32)
        _scale(*about, minus_zero if plus is None else plus.detach().numpy())

"""A frozen base's layers in whole numbers of eight bits, whose products are the same bits beside any other rows.

Each output's weights have one scale, their largest absolute value / 127, and of each weight is kept the nearest whole
multiple.  A row of what comes in is rounded likewise, with a scale for each part of `PART` values.  The product of a
part is a sum of whole numbers, in int32; scales turn it back into float32, where the parts are added up in their order.
On the way back the outputs' scales are multiplied into the gradient before it is rounded, so that one layout of the
weights, a byte each, serves both ways.  SwitchBack (Wortsman et al. 2023, arXiv 2304.13013) trains so; a frozen base
has no gradient of weights, the product that it leaves in 16 bits.

A few columns of a model's activations are far larger than all others, and a row's scale follows them.  So a factor
moves part of a column's size into the weights before these are rounded (SmoothQuant: Xiao et al. 2022, arXiv
2211.10438).  It follows from the weights and from what the base makes of random tokens, so from nothing but the public
base.  It is a power of the fourth root of two, so that machines which round otherwise seldom find another one.

**A row is independent of its neighbours by arithmetic.**  A sum of whole numbers below 2**24 does not depend on the
order in which they are added, so not on the number of rows, threads or blocks either, nor on the kernel, as long as it
adds in int32 or float32; `_adds_whole_numbers` tries whether it does.  All else is done value by value, by float32
operations that IEEE 754 rounds alike everywhere, or is the largest of a row, which is exact.  A row that is not finite
comes out as NaN.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedtune.model.products import by_output
from fedtune.model.quantized import Quantized, quantize_linear

_log = logging.getLogger(__name__)
LARGEST = 127  # of a rounded value; -128 has no opposite
PART = 384
"""Terms of a sum, of at most 1,040 that float32 holds exactly.  Of MiniLM's longest rows, 1,536 values behind its
activation, the largest decides for fewer others then: with the finer factors the pooled states are 3.7 % from float32's
in place of 5.0 %."""
_FEWEST_TERMS = 8  # that torch's kernel is asked for: of one term, torch 2.13 leaves the sums unwritten on a CPU
_ROOTS = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)  # powers of the fourth root of two
_SMALLEST = 1e-30  # a row of smaller values, zeros among them, is rounded as if this were its largest
_PLACES, _SEED = (4, 64), 20240  # of random tokens, rows and columns, and what they are drawn from
_QUIET = 1 / 16
"""Of the median column: what is smaller than this is taken to be so large, since other tokens may be louder."""
_BLOCK = 2**18  # values that a CPU works on at a time, so that they stay in a core's cache from one pass to the next


def round_rows(rows: torch.Tensor, factors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers (n, k) in int8 and their float32 scales (n, parts): near `rows` (n, k) times `factors` (k,)."""
    whole, scales = torch.empty_like(rows, dtype=torch.int8), rows.new_empty(len(rows), -(-rows.shape[1] // PART))
    passes = _passes(rows.device.type)
    for some, numbers, of_rows in _blocks(_rows_at_a_time(rows, rows.shape[1]), rows, whole, scales):
        passes.round_into(some, factors, numbers, of_rows, PART)
    return whole, scales


def round_into(rows: torch.Tensor, factors: torch.Tensor, whole: torch.Tensor, scales: torch.Tensor, part: int) -> None:
    """Round `rows` (n, k), times `factors` (k,), into `whole` (n, k) int8 and `scales` (n, parts) of `part` values."""
    most = rows.new_full((), LARGEST)  # by a plain number CUDA divides as if it multiplied, with another rounding
    for number, values in enumerate(torch.split(rows * factors, part, dim=1)):
        # Both ends of a row, since its absolute values would have to be written down first.
        largest = torch.maximum(values.amax(dim=1, keepdim=True), values.amin(dim=1, keepdim=True).neg_())
        # Of a row that is not finite numbers are anything, and the scale is NaN, since zero times infinity is.
        largest = torch.add(largest.clamp(min=_SMALLEST), largest, alpha=0).div_(most)
        whole[:, number * part : (number + 1) * part].copy_((values / largest).round_())
        scales[:, number] = largest[:, 0]


def scale_into(
    out: torch.Tensor, sums: torch.Tensor, of_rows: torch.Tensor, of_columns: torch.Tensor, plus: torch.Tensor | None
) -> None:
    """Put `sums` (n, m) times scales of rows (n,) and columns (m,) into `out` (n, m) float32.

    With (m,) or (n, m) numbers added to that, which may be `out` itself.
    """
    scaled = torch.mul(sums, of_rows[:, None]).mul_(of_columns)
    # By itself: in `addcmul` a compiler may leave out a rounding, here and not there.
    out.copy_(scaled if plus is None else scaled.add_(plus))


@cache
def _passes(device: str) -> ModuleType:
    """The passes around a product: this module, or `int8_kernels` with the same bits in fewer over memory."""
    torchs = sys.modules[__name__]
    if device != "cpu" or not find_spec("numba") or not _adds_whole_numbers(device):
        return torchs
    try:
        from fedtune.model import int8_kernels

        one = torch.ones(1, 1)
        int8_kernels.round_into(one, one[0], torch.empty(1, 1, dtype=torch.int8), torch.empty(1, 1), 1)
        return int8_kernels
    except Exception:  # numba is for another numpy, or has nowhere to write: it raises whatever comes
        _log.warning("numba cannot be used; int8 products take longer without it", exc_info=True)
        return torchs


def _rows_at_a_time(rows: torch.Tensor, width: int) -> int:
    return max(16, _BLOCK // width) if rows.device.type == "cpu" else max(1, len(rows))


def _blocks(size: int, *tensors: torch.Tensor) -> Iterable[tuple[torch.Tensor, ...]]:
    """The same rows of each, so many at a time."""
    return (tensors,) if len(tensors[0]) <= size else zip(*(torch.split(one, size) for one in tensors), strict=True)


class Rounding:
    """Rounds what comes in once for all layers that read it, as query, key and value do.

    It knows the last tensor that it rounded, by identity and version, as long as that exists, and for whom.  What is
    written through `.data` has no version; nothing does so between layers.
    """

    def __init__(self) -> None:
        # One value, so that another thread finds all of it or none.
        self._last: tuple[weakref.ref[torch.Tensor], tuple[int, int], tuple[torch.Tensor, torch.Tensor]] | None = None

    def __call__(self, values: torch.Tensor, layer: Int8) -> tuple[torch.Tensor, torch.Tensor]:
        """As `round_rows` of `values` (..., k), as n rows, by the layer's factors."""
        if values.is_inference():  # it has no version
            return round_rows(values.flatten(0, -2), layer.factors)
        last, state = self._last, (values._version, layer.reader)
        if last is not None and last[0]() is values and last[1] == state:
            return last[2]
        rounded = round_rows(values.detach().flatten(0, -2), layer.factors)
        self._last = weakref.ref(values), state, rounded
        return rounded


class Int8(Quantized):
    """A linear module that keeps whole numbers and a scale for each output in place of its weights."""

    whole: torch.Tensor  # (out, in) int8
    scales: torch.Tensor  # (out,) float32
    factors: torch.Tensor  # (in,) float32, by which a row is multiplied before it is rounded
    reader: int  # a number that layers which read the same have in common, with their factors
    rounding: Rounding  # shared by all layers of a base

    def __init__(self, module: nn.Linear | Conv1D, *, rounding: Rounding, reader: int, factors: torch.Tensor) -> None:
        super().__init__(module)
        self.rounding, self.reader = rounding, reader
        self.register_buffer("factors", factors)
        self.take_over(module, factors.device)

    @property
    def weight(self) -> torch.Tensor:
        """(out, in) in float32."""
        return self.whole * self.scales[:, None] * self.factors

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Whole numbers and scales of (out, in) weights: one for all that an output reads."""
        rows = weight.float().contiguous()
        whole, scales = torch.empty_like(rows, dtype=torch.int8), rows.new_empty(len(rows), 1)
        round_into(rows, 1 / self.factors, whole, scales, rows.shape[1])
        return {"whole": whole, "scales": scales[:, 0]}

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out), in float32."""
        return _Product.apply(values, self)  # type: ignore[no-any-return, no-untyped-call]


class Int8Linear(Int8, nn.Linear):  # type: ignore[misc, override]  # whose weights are no parameter
    """For torch's own kind."""


class Int8Conv1D(Int8, Conv1D):  # type: ignore[misc]  # transformers has no types for it
    """For GPT-2's kind, whose weights are (in, out)."""

    @property
    def weight(self) -> torch.Tensor:
        """(in, out) in float32."""
        return super().weight.t()

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Whole numbers (out, in) and scales."""
        return super().quantize(weight.t())


def keep_in_int8(base: PreTrainedModel, layers: nn.Module, *, device: torch.device | str) -> None:
    """Keep the weights of every frozen linear module of `layers` in int8, on `device`, and let it multiply so.

    Args:
        base: float32, on the CPU; a model that takes `input_ids`.
        layers: some of its modules; changed in place.
        device: where they go.
    """
    linear = [module for module in layers.modules() if type(module) in (nn.Linear, Conv1D)]
    seen, rounding = _columns(base, linear), Rounding()
    factors: dict[int, torch.Tensor] = {}
    for reader in {reader for reader, _ in seen.values()}:
        modules = [module for module in linear if seen[module][0] == reader]
        weights = torch.stack([by_output(module).abs().amax(dim=0) for module in modules]).amax(dim=0)
        columns = seen[modules[0]][1]
        columns = columns.clamp(min=max(_QUIET * float(columns.median()), _SMALLEST))
        shares = weights.clamp(min=max(2.0**-24 * float(weights.max()), _SMALLEST)) / columns
        roots = (shares.log2() * 2).round().int().numpy()
        found = np.ldexp(np.array(_ROOTS, dtype=np.float32)[roots % 4], roots // 4)  # by numpy, where that is exact
        factors[reader] = torch.from_numpy(found).to(device)

    def reads(module: nn.Module) -> dict[str, Any]:
        reader, _ = seen[module]
        return {"rounding": rounding, "reader": reader, "factors": factors[reader]}

    quantize_linear(layers, Int8Linear, Int8Conv1D, reads)


def _columns(base: PreTrainedModel, linear: list[nn.Module]) -> dict[nn.Module, tuple[int, torch.Tensor]]:
    """Of each module a number for what it reads, and the largest absolute value (in,) of each column of that.

    Modules that random tokens do not come to read nothing: they get a number of their own, and ones.
    """
    seen: dict[nn.Module, tuple[int, torch.Tensor]] = {}
    inputs: list[weakref.ref[torch.Tensor]] = []

    def note(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        known = [number for number, one in enumerate(inputs) if one() is given[0]]
        if not known:
            inputs.append(weakref.ref(given[0]))
        seen[module] = (known or [len(inputs) - 1])[0], given[0].flatten(0, -2).abs().amax(dim=0)

    hooks = [module.register_forward_pre_hook(note) for module in linear]
    try:
        draws = torch.Generator().manual_seed(_SEED)
        ids = len(base.get_input_embeddings().weight)
        with torch.no_grad():
            base(input_ids=torch.randint(ids, _PLACES, generator=draws))
    finally:
        for hook in hooks:
            hook.remove()
    for module in linear:
        if module not in seen:
            seen[module] = len(inputs) + len(seen), torch.ones(by_output(module).shape[1])
    return seen


class _Product(torch.autograd.Function):
    """`values` (..., in) times a layer's weights, plus its bias."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, layer: Int8) -> torch.Tensor:
        assert values.dtype == torch.float32, "the base is float32 outside its products"
        ctx.layer = layer
        whole, scales = layer.rounding(values, layer)
        out = scales.new_empty(len(whole), len(layer.whole))
        for rows, of_rows, into in _blocks(_rows_at_a_time(whole, len(layer.whole)), whole, scales, out):
            _multiply_into(into, rows, of_rows, layer.whole.t(), layer.scales, layer.bias)
        return out.view(*values.shape[:-1], out.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        layer, gradient = ctx.layer, gradients[0].flatten(0, -2)
        out = gradient.new_empty(len(gradient), layer.whole.shape[1])
        for rows, into in _blocks(_rows_at_a_time(gradient, max(layer.whole.shape)), gradient, out):
            _multiply_into(into, *round_rows(rows, layer.scales), layer.whole, layer.factors, None)
        return out.view(*gradients[0].shape[:-1], out.shape[1]), None


def _multiply_into(
    out: torch.Tensor,
    whole: torch.Tensor,
    scales: torch.Tensor,
    factor: torch.Tensor,
    of_columns: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """Put rows (n, k), by whole numbers and scales (n, parts), times `factor` (k, m) int8, plus a bias, into `out`."""
    passes, plus = _passes(out.device.type), bias
    parts = zip(torch.split(whole, PART, dim=1), torch.split(factor, PART), scales.t(), strict=True)
    for some, part, of_rows in parts:
        passes.scale_into(out, add_products(some, part), of_rows, of_columns, plus)
        plus = out


def add_products(rows: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The matrix product of int8 (n, k) and (k, m), k at most `PART`: whole numbers in int32, or in float32.

    The same numbers on every machine: without instructions for it, float32 holds all of them exactly.
    """
    terms, device = rows.shape[1], rows.device.type
    fits = device == "cpu" or terms % 8 == factor.shape[1] % 8 == 0
    if terms >= _FEWEST_TERMS and fits and _adds_whole_numbers(device):
        return _int_mm(rows, factor)
    return rows.float() @ factor.float()


def _int_mm(rows: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Torch's kernel for int8; on a GPU cuBLAS wants multiples of 8, more than 16 rows, and a factor read by column."""
    if rows.device.type == "cpu":
        return torch._int_mm(rows, factor)
    enough = nn.functional.pad(rows, (0, 0, 0, max(0, 17 - len(rows))))
    return torch._int_mm(enough, factor.t().contiguous().t())[: len(rows)]


@cache
def _adds_whole_numbers(device: str) -> bool:
    """Torch has a kernel of its own here that adds products of int8 in int32.

    Tried with every pair of values, each several times in a row: a kernel that takes one side for 0 to 255 and adds
    two products in 16 bits saturates (pytorch#136746).  On a CPU without VNNI torch has that one, or a slow loop
    (pytorch#136942).
    """
    if device == "cpu" and not torch.cpu._is_vnni_supported():
        return False
    values = torch.arange(-LARGEST, LARGEST + 1, dtype=torch.int8, device=device)
    values = torch.cat([values, values[:1]])  # of which there are a multiple of 8
    whole = values.to(torch.int32)
    for terms in (*range(_FEWEST_TERMS, 17, 1 if device == "cpu" else 8), 64, 1536):  # cuBLAS wants multiples of 8
        rows = values[:, None].repeat(1, terms)
        try:
            for factor in (rows.t(), rows.t().contiguous()):
                if not torch.equal(_int_mm(rows, factor), terms * whole[:, None] * whole):
                    return False
        except (RuntimeError, NotImplementedError):
            return False
    return True

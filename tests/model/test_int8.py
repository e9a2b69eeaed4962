"""A base's layers in whole numbers: which values they keep, and products that are the same bits beside any others."""

import importlib.util
import os
import subprocess
import sys
from copy import deepcopy
from functools import cache, partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedtune.model import int8
from fedtune.model.base_model import load_base
from fedtune.model.int8 import PART, Int8, keep_in_int8, round_rows
from fedtune.model.spec import ModelSpec
from fedtune.training.machine import model_bytes

from .conftest import backwards, both_ways, same_beside_others

MODULES = [nn.Linear(96, 80), nn.Linear(1536, 96, bias=False), Conv1D(80, 96)]
modules = pytest.mark.parametrize("module", MODULES, ids=["linear", "many terms", "transposed"])


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test makes of the kernel is not what the next one is told."""
    for name in ("_adds_whole_numbers", "_passes"):
        monkeypatch.setattr(int8, name, cache(getattr(int8, name).__wrapped__))


class Base(nn.Module):
    """A base of some linear modules that all read the same, some columns of which are a thousand times larger."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        size = modules[0].in_features if isinstance(modules[0], nn.Linear) else modules[0].nx
        self.embedding = nn.Embedding(50, int(size))
        self.embedding.weight.data[:, ::7] *= 1000
        self.layers = nn.ModuleList(modules)
        self.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor) -> list[torch.Tensor]:
        states = self.embedding(input_ids)
        return [layer(states) for layer in self.layers]


def in_int8(*modules: nn.Module) -> Base:
    base = Base(*map(deepcopy, modules))
    keep_in_int8(base, base.layers, device="cpu")  # type: ignore[arg-type]
    return base


def kept(module: nn.Module) -> Int8:
    layer = in_int8(module).layers[0]
    assert isinstance(layer, Int8)
    return layer


@modules
def test_a_weight_is_the_nearest_multiple_of_its_output_s_scale(module: nn.Module) -> None:
    layer = kept(module)
    weight, stands_for = (
        (one if isinstance(module, nn.Linear) else one.t()) for one in (module.weight.detach(), layer.weight)
    )
    assert layer.weight.shape == layer.shape == module.weight.shape
    assert layer.whole.abs().amax(dim=1).tolist() == [127] * len(layer.whole)
    assert torch.equal(layer.scales, (weight * (1 / layer.factors)).abs().amax(dim=1) / 127)
    assert ((weight - stands_for).abs() <= layer.scales[:, None] * layer.factors * 0.50001).all()
    formats = {"factors": torch.float32, "whole": torch.int8, "scales": torch.float32}
    assert {name: one.dtype for name, one in layer.named_buffers()} == formats


def test_large_columns_are_made_smaller_before_a_row_is_rounded() -> None:
    torch.manual_seed(0)
    base, ids = Base(nn.Linear(70, 40), nn.Linear(70, 30)), torch.arange(50)[None]
    for layer in base.layers:
        layer.weight.data[:, ::7] /= 1000  # so that every column matters alike
    coarse = in_int8(*base.layers)
    coarse.embedding = base.embedding
    factors = [layer.factors for layer in coarse.layers]
    assert torch.equal(factors[0], factors[1]), "what reads the same is rounded once"
    assert torch.isin(factors[0].frexp()[0], torch.tensor([1, 2**0.25, 2**0.5, 2**0.75]) / 2).all()
    assert -10.2 < factors[0].log2()[::7].mean() - factors[0].log2()[1::7].mean() < -9.8
    wanted, found = base(ids), coarse(ids)
    rounded = torch.mul(*round_rows(base.embedding(ids)[0], torch.ones(70)))
    for exact, one, layer in zip(wanted, found, base.layers, strict=True):
        assert (one - exact).norm() < 0.02 * exact.norm()
        assert (layer(rounded) - exact[0]).norm() > 0.2 * exact.norm(), "all but the large columns are lost"
    alone = Base(nn.Linear(8, 8), nn.Linear(8, 8))
    alone.forward = lambda input_ids: alone.layers[0](alone.embedding(input_ids))  # type: ignore[method-assign]
    keep_in_int8(alone, alone.layers, device="cpu")  # type: ignore[arg-type]
    assert isinstance(alone.layers[1], Int8)
    assert alone.layers[1].reader != alone.layers[0].reader, "nobody came to it"


@modules
def test_product_and_gradient_are_those_of_rounded_numbers_exactly(module: nn.Module) -> None:
    torch.manual_seed(0)
    layer = kept(module)
    size = layer.whole.shape[1]
    values, direction = torch.randn(3, 5, size) * 10 ** torch.randn(3, 5, 1), torch.randn(3, 5, len(layer.whole))
    values /= layer.factors  # as large as they were seen
    found, gradient = both_ways(layer, values, direction)
    bias = torch.tensor(-0.0) if layer.bias is None else layer.bias
    for rows, came, weights, of_rows, of_columns, plus in (
        (values, found, layer.whole.t(), layer.factors, layer.scales, bias),
        (direction, gradient, layer.whole, layer.scales, layer.factors, torch.tensor(-0.0)),
    ):
        whole, scales = round_rows(rows.view(15, -1), of_rows)
        for number in range(scales.shape[1]):
            part = slice(number * PART, (number + 1) * PART)
            sums = whole[:, part].long() @ weights[part].long()  # int64 holds them, however they are added
            plus = sums.float() * scales[:, number, None] * of_columns + plus
        assert torch.equal(came.view(15, -1), plus)
    exact = values.double() @ (module.weight.double() if isinstance(module, Conv1D) else module.weight.double().t())
    exact = exact if module.bias is None else exact + module.bias
    assert (found - exact).norm() < 0.05 * exact.norm(), "measured: 0.01 to 0.02"


PLACES = """
import torch
from torch import nn
from fedtune.model.int8 import keep_in_int8
from tests.model.test_int8 import Base
import hashlib
for threads in (1, 2):
    torch.set_num_threads(threads)
    for outs, ins, rows in ((384, 1536, 300), (1536, 384, 700), (80, 96, 5), (33, 7, 1), (64, 1, 9), (1, 64, 9)):
        draws = torch.Generator().manual_seed(0)
        layer = nn.Linear(ins, outs)
        layer.weight.data = torch.rand(outs, ins, generator=draws) - 0.4
        layer.bias.data.zero_()
        base = Base(layer)
        base.embedding.weight.copy_(torch.rand(50, ins, generator=draws))
        keep_in_int8(base, base.layers, device="cpu")
        values = (torch.rand(rows, ins, generator=draws) - 0.3).requires_grad_()
        found = base.layers[0](values)
        found.backward(torch.rand(rows, outs, generator=draws))
        print(hashlib.sha256(found.detach().numpy().tobytes() + values.grad.numpy().tobytes()).hexdigest())
"""


def test_the_same_bits_by_every_kernel_and_any_number_of_threads() -> None:
    """As on CPUs without AMX, without VNNI, whose own kernel saturates, and without AVX-512."""
    printed = {}
    for instructions in ("DEFAULT", "AVX512_CORE_VNNI", "AVX512_CORE", "AVX2"):
        env = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions, "OMP_NUM_THREADS": "2"}
        ran = subprocess.run([sys.executable, "-c", PLACES], env=env, capture_output=True, text=True, check=True)
        printed[instructions] = ran.stdout.split()
    assert len(printed["AVX2"]) == 12
    assert printed["AVX2"][:6] == printed["AVX2"][6:]
    assert all(lines == printed["AVX2"] for lines in printed.values())


@pytest.mark.parametrize("own_kernel", [True, False], ids=["int8 kernel", "float32 in parts"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(384, 1536), (1536, 384), (33, 7), (64, 1), (1, 64)])
def test_a_row_is_the_same_in_every_number_of_rows(
    shape: tuple[int, int], threads: int, own_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not own_kernel:
        monkeypatch.setattr(int8, "_adds_whole_numbers", lambda _: False)
    rows = torch.full((20, PART), 127, dtype=torch.int8)
    rows[1, :9] = 1  # a number that float16 or bfloat16 would not hold
    sums = int8.add_products(rows, rows.t())
    assert torch.equal(sums.long(), rows.long() @ rows.long().t()), "the largest sums are exact"
    assert sums.max() == PART * 127**2 < 2**24
    layer = kept(nn.Linear(shape[1], shape[0]))
    for multiply, size in ((layer, shape[1]), (partial(backwards, layer, shape[1]), shape[0])):
        values = torch.randn(700, size) * 10 ** torch.randn(700, 1)
        values[3] = torch.inf  # whoever stands beside it
        values[4, 0] = torch.nan
        ordinary = torch.cat([values[:3], values[5:]])
        alone, beside = multiply(ordinary), multiply(values)
        assert torch.equal(alone, torch.cat([beside[:3], beside[5:]]))
        assert same_beside_others(multiply, ordinary, threads=threads, fewest=1)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_row_that_is_not_finite_comes_out_as_nan_and_one_of_zeros_as_the_bias(bad: float) -> None:
    layer = kept(nn.Linear(64, 8))
    values = torch.randn(4, 64)
    values[1, 5], values[2] = bad, 0.0
    found, gradient = both_ways(layer, values, torch.tensor([[1.0], [1.0], [0.0], [bad]]).expand(4, 8))
    assert found[1].isnan().all()
    assert torch.equal(found[2], layer.bias)
    assert gradient[3].isnan().all()
    assert not gradient[2].any()
    assert found[[0, 2, 3]].isfinite().all()
    assert gradient[:3].isfinite().all()


def test_a_kernel_that_adds_two_products_in_16_bits_is_found_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(rows: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        # What a CPU without VNNI does: rows from 0 to 255, and pairs of products of at most 2**15 - 1 added in int32.
        products = (rows.int() + 128)[:, :, None] * factor.int()[None]
        pairs = products.unflatten(1, (-1, 2)).sum(dim=2).clamp(-(2**15), 2**15 - 1)
        return (pairs.sum(dim=1) - 128 * factor.int().sum(dim=0)).int()

    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not int8._adds_whole_numbers("cpu")
    rows, factor = torch.full((2, 4), 127, dtype=torch.int8), torch.full((4, 3), 127, dtype=torch.int8)
    assert int8.add_products(rows, factor).unique().tolist() == [4 * 127**2]


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="the package numba is missing")
@pytest.mark.parametrize("size", [1, 33, 384])
def test_compiled_passes_have_the_same_bits_as_torch_s(size: int, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    from fedtune.model import int8_kernels

    sums, of_rows = torch.randint(-(2**24), 2**24, (40, size), dtype=torch.int32), torch.rand(40, 1)
    of_outputs, bias = torch.rand(size), torch.randn(size)
    for plus in (None, bias, "itself"):
        one = other = torch.randn(40, size)
        for numbers in (sums, sums.float()):
            one, other = one.clone(), one.clone()
            for passes, out in ((int8, one), (int8_kernels, other)):
                passes.scale_into(out, numbers, of_rows[:, 0], of_outputs, out if plus == "itself" else plus)  # type: ignore[arg-type]
            assert torch.equal(one.view(torch.int32), other.view(torch.int32)), "minus zero, too"
    rows = torch.randn(40, size) * 10.0 ** torch.randint(-44, 30, (40, 1))
    rows[3:5] = 0.0
    halves = torch.arange(40 * size).view(40, size) % 255 - 127 + 0.5  # as near to one whole number as to another
    halves[:, 0] = 127.0
    part, parts = (size, 1) if size < 300 else (300, 2)
    for values in (rows, halves, rows.t().contiguous().t()):
        for factors in (torch.ones(size), of_outputs):
            found = [(torch.empty(40, size, dtype=torch.int8), torch.empty(40, parts)) for _ in range(2)]
            for passes, into in zip((int8, int8_kernels), found, strict=True):
                passes.round_into(values, factors, *into, part)
            assert torch.equal(found[0][0], found[1][0])
            assert torch.equal(found[0][1].view(torch.int32), found[1][1].view(torch.int32))
    rows[5], rows[6, 0], rows[7, 0] = torch.nan, torch.inf, -torch.inf
    int8_kernels.round_into(rows, torch.ones(size), *found[0], part)
    assert found[0][1][:, 0].isnan().nonzero().flatten().tolist() == [5, 6, 7]
    # A numba that cannot be used is done without.
    monkeypatch.setattr(int8, "_adds_whole_numbers", lambda _: True)
    monkeypatch.setattr(int8_kernels, "round_into", Mock(side_effect=OSError("no space left on device")))
    assert int8._passes("cpu") is int8
    assert "int8 products take longer without it" in caplog.text


def test_layers_that_read_the_same_round_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base = in_int8(*(nn.Linear(8, 8) for _ in range(3))).layers
    rounded = Mock(wraps=round_rows)
    monkeypatch.setattr(int8, "round_rows", rounded)
    values = torch.randn(2, 3, 8)
    first = [layer(values) for layer in base]
    assert rounded.call_count == 1
    values.mul_(2)
    again = [layer(values) for layer in base]
    assert rounded.call_count == 2, "changed in place"
    assert not any(map(torch.equal, first, again))
    base[0](values.clone())
    assert rounded.call_count == 3, "another tensor of the same values"
    with torch.inference_mode():
        assert torch.equal(base[0](values * 1), again[0])
    assert base[0](values[:0]).shape == (0, 3, 8)


@pytest.mark.parametrize(("path", "predicts_tokens"), [("random:bert", False), ("random:llama", True)])
def test_layers_are_kept_in_a_byte_a_weight_and_their_factors_are_shared(path: str, predicts_tokens: bool) -> None:
    base, again, plain = (
        load_base(ModelSpec(path=path, dtype=dtype), predicts_tokens=predicts_tokens)  # type: ignore[arg-type]
        for dtype in ("int8", "int8", "float32")
    )
    assert all(map(torch.equal, base.buffers(), again.buffers())), "factors too are the same each time"
    inside = [module for module in base.modules() if isinstance(module, Int8)]
    weights, outputs = (
        sum(each) for each in zip(*((one.shape.numel(), len(one.scales)) for one in inside), strict=True)
    )
    columns = {module.reader: len(module.factors) for module in inside}
    assert len(columns) < len(inside), "factors are shared"
    assert model_bytes(plain) - model_bytes(base) == 3 * weights - 4 * outputs - 4 * sum(columns.values())

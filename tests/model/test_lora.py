"""LoRA, IA3 and DoRA: trained tensors, initial values, and compatibility with PEFT."""

import json
import math
from typing import Any, Literal

import pytest
import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from fedtune.model.base_model import load_base
from fedtune.model.ia3_and_dora import iter_peft_scales, merge_adapter
from fedtune.model.layers import attach_adapters, suspend_adapters
from fedtune.model.spec import LoraSpec, ModelSpec
from fedtune.spec import ConfigError
from fedtune.tasks.task_model import TaskModel, build_task_model

from ..builders import set_random_values
from ..cli import snapshots
from .conftest import make_spec, make_trained

kinds = pytest.mark.parametrize("kind", ["dora", "ia3"])
PATHS = ("random:bert", "random:llama")
IDS = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])


def list_offsets(model: TaskModel) -> list[str]:
    return [name for name in model.trainable() if name.endswith(".scales.offset")]


def compute_outputs(base: Any) -> torch.Tensor:
    hidden: torch.Tensor = base(input_ids=IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state
    return hidden


@pytest.mark.parametrize("path", PATHS)
def test_trainable_tensors_match_the_adapter_kind(path: str) -> None:
    def list_trainable(kind: str, **changes: Any) -> list[str]:
        model = build_task_model(make_spec(path, lora=LoraSpec(kind=kind, rank=2, **changes)))
        assert all(one.dtype == torch.float32 for one in model.trainable().values())
        assert list(model.collect_adapter_parameters()) == list(model.trainable()) or "train_a" in changes
        assert any("lora_A" in name for name in model.collect_adapter_parameters()) == (kind != "ia3"), (
            "frozen factors must be collected, too"
        )
        return [name for name in model.trainable() if not name.startswith("head.")]

    modules = len(list_trainable("lora")) // 2
    assert all("lora_B" in name for name in list_trainable("lora", train_a=False))
    assert len(list_trainable("lora", train_a=False)) == modules
    assert len(list_trainable("dora")) == 3 * modules
    assert len(list_trainable("dora", train_a=False)) == 2 * modules
    assert len(list_trainable("ia3")) == modules
    assert set(list_trainable("dora")) == {*list_trainable("lora"), *list_trainable("ia3")}
    assert all(".1." in name for name in list_trainable("ia3", layers=(-1,)))
    assert 2 * len(list_trainable("ia3", layers=(-1,))) == modules
    by_name = build_task_model(make_spec(lora=LoraSpec(kind="ia3", target_modules=("query", "attention.output.dense"))))
    assert [name.split("layer.")[1] for name in list_offsets(by_name)] == [
        f"{layer}.attention.{module}.scales.offset" for layer in (0, 1) for module in ("output.dense", "self.query")
    ]


@kinds
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("path", PATHS)
def test_zero_adapter_leaves_outputs_bitwise_unchanged(path: str, dtype: Any, kind: str) -> None:
    plain = compute_outputs(load_base(ModelSpec(path=path, dtype=dtype)))
    base = load_base(ModelSpec(path=path, dtype=dtype))
    model = attach_adapters(base, spec=LoraSpec(kind=kind, rank=2), predicts_tokens=False, seed=0)
    assert torch.equal(compute_outputs(model), plain)


def adapt_query(**lora: Any) -> tuple[TaskModel, Any]:
    """Return a model with a single adapted module, and that module."""
    model = build_task_model(make_spec(lora=LoraSpec(target_modules=("query",), layers=(0,), **lora)))
    return model, next(one for name, one in model.named_modules() if name.endswith("layer.0.attention.self.query"))


def test_ia3_offset_scales_the_module_output() -> None:
    model, layer = adapt_query(kind="ia3")
    inputs, (name,) = torch.randn(2, 3, 32), list_offsets(model)
    plain = layer(inputs)
    with torch.no_grad():
        model.trainable()[name].copy_(torch.linspace(-2, 2, 32))  # within a site's bound: factors from -1 to 3
    assert torch.allclose(layer(inputs), plain * torch.linspace(-1, 3, 32))


def test_dora_offset_scales_the_row_norm() -> None:
    model, layer = adapt_query(kind="dora", rank=2)
    set_random_values(model, 0.3)
    scalings = [adapt_query(rank=4, alpha=6.0, rslora=on)[1].scaling["default"] for on in (False, True)]
    assert scalings == pytest.approx([6.0 / 4, 6.0 / math.sqrt(4)])
    inputs, start = torch.randn(2, 3, 32), layer.base_layer.weight
    matrix = start + 8.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    length = start.norm(dim=1) * (1 + layer.scales.offset)
    expected = inputs @ (length[:, None] * matrix / matrix.norm(dim=1, keepdim=True)).T + layer.base_layer.bias
    assert torch.allclose(layer(inputs), expected, atol=1e-4)


@kinds
@pytest.mark.parametrize("path", PATHS)
def test_adapter_can_be_disabled_saved_and_merged_by_peft(path: str, kind: str) -> None:
    model = make_trained(path, lora=LoraSpec(kind=kind, rank=2, alpha=4.0))
    expected, as_it_was = compute_outputs(model.base), compute_outputs(load_base(ModelSpec(path=path)))
    assert not torch.allclose(expected, as_it_was, atol=1e-2)
    with suspend_adapters(model.base):
        assert torch.equal(compute_outputs(model.base), as_it_was)
    saved = get_peft_model_state_dict(model.base)
    for name, start, values in iter_peft_scales(model.base):
        assert saved[name].shape == start.shape == values.shape
        assert not torch.equal(start, values)
    assert len(list(iter_peft_scales(model.base))) == len(list_offsets(model))
    plain = merge_adapter(model.base)
    assert type(plain) is type(load_base(ModelSpec(path=path)))
    assert not any("scales" in name or "lora" in name for name, _ in plain.named_modules())
    assert torch.allclose(compute_outputs(plain), expected, rtol=1e-4, atol=1e-4)


def compute_captured_share(weight: torch.Tensor, rows: torch.Tensor) -> float:
    """Compute the energy of `weight` (out, in) along orthogonal rows, as a share of the most that they can capture."""
    captured = (weight @ rows.detach().T / rows.detach().norm(dim=1)).square().sum()
    return float(captured / torch.linalg.svdvals(weight)[: len(rows)].square().sum())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_principal_rows_are_the_leading_right_singular_vectors(kind: str) -> None:
    spec = LoraSpec(kind=kind, rank=2, init="principal")
    for seed in (0, 1):
        base = load_base(ModelSpec(path="random:bert"))
        plain = compute_outputs(base)
        model = attach_adapters(base, spec=spec, predicts_tokens=False, seed=seed)
        assert torch.equal(compute_outputs(model), plain)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                rows = module.lora_A["default"].weight
                assert torch.allclose(rows @ rows.T, torch.eye(2) / 3, atol=1e-6)
                assert compute_captured_share(module.get_base_layer().weight, rows) > 0.999


def test_principal_rows_do_not_depend_on_the_number_of_threads() -> None:
    def read_rows(weight: torch.Tensor, threads: int, init: Literal["random", "principal"]) -> torch.Tensor:
        config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=9)
        base = LlamaModel(config).requires_grad_(False)
        base.layers[0].mlp.up_proj.weight.data = weight
        spec = LoraSpec(rank=4, init=init, target_modules=("up_proj",))
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        model = attach_adapters(base, spec=spec, predicts_tokens=False, seed=0)
        torch.set_num_threads(before)
        return next(one for name, one in model.named_parameters() if "lora_A" in name)

    torch.manual_seed(0)
    normal = torch.randn(64, 64)
    low_rank, alike = normal[:, :3] @ normal[:3], torch.linalg.qr(normal).Q
    for weight in (normal, low_rank, alike, torch.zeros(64, 64), torch.full((64, 64), math.nan)):
        first, second = (read_rows(weight.clone(), threads, "principal") for threads in (1, 2))
        assert torch.allclose(first, second, atol=1e-6)
        assert torch.equal(first, read_rows(weight.clone(), 1, "random")) == (weight is not normal)


def test_principal_init_handles_conv1d_and_skips_small_modules() -> None:
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, n_inner=4, vocab_size=50, n_positions=64)
    torch.manual_seed(0)
    spec = LoraSpec(rank=6, init="principal")
    model = attach_adapters(GPT2Model(config), spec=spec, predicts_tokens=False, seed=0)
    shares = dict[str, float]()
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            weight, rows = module.get_base_layer().weight.T, module.lora_A["default"].weight
            assert torch.isfinite(rows).all()
            shares[name.rpartition(".h.0.")[2]] = compute_captured_share(weight, rows)
    assert shares["attn.c_attn"] > 0.995
    assert shares["attn.c_proj"] > 0.995
    assert shares["mlp.c_fc"] < 0.995, "6 rows, but weights of rank 4: the rows stay random"


def test_dora_refuses_weights_with_a_zero_row() -> None:
    base = load_base(ModelSpec(path="random:bert"))
    with torch.no_grad():
        base.get_parameter("encoder.layer.1.output.dense.weight")[3] = 0
    with pytest.raises(ConfigError, match=r"lora\.kind = 'dora': .*layer\.1\.output\.dense have a row of zeros"):
        attach_adapters(base, spec=LoraSpec(kind="dora", rank=2), predicts_tokens=False, seed=0)


def test_dora_and_ia3_support_transposed_modules() -> None:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=64, resid_pdrop=0, attn_pdrop=0)
    for kind in ("dora", "ia3"):
        torch.manual_seed(0)
        base = GPT2Model(config).eval().requires_grad_(False)
        plain = compute_outputs(base)
        model = attach_adapters(base, spec=LoraSpec(kind=kind, rank=2), predicts_tokens=False, seed=0)
        assert torch.equal(compute_outputs(model), plain)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape) * 0.2)
        expected = compute_outputs(model)
        assert torch.allclose(compute_outputs(merge_adapter(model)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("path", "task", "modules"), [("random:bert", "classification", 6), ("random:llama", "causal_lm", 7)]
)
def test_all_linear_selects_modules_only_within_the_chosen_layers(path: str, task: str, modules: int) -> None:
    def adapt_layers(*layers: int) -> list[str]:
        model = build_task_model(make_spec(path, task, lora=LoraSpec(rank=2, layers=layers or None)))
        return [name for name in model.trainable() if name != "head.weight"]

    assert len(adapt_layers()) == 2 * 2 * modules
    assert not any(word in name for name in adapt_layers() for word in ("pooler", "embed", "lm_head"))
    assert adapt_layers(-1) == adapt_layers(1)
    assert adapt_layers(-1, -2) == adapt_layers(0, 1) == adapt_layers()
    assert all(".1." in name for name in adapt_layers(-1))


@snapshots.parametrize_mistakes("mistakes-lora")
def test_invalid_lora_targets_and_ranks_are_refused(typed: str) -> None:
    """Ranks are checked before allocation, because a rank of a million took 21 GB and the process was killed."""
    with pytest.raises(ConfigError) as error:
        build_task_model(make_spec(lora=LoraSpec(**json.loads(typed))))
    snapshots.check_message("mistakes-lora", typed, str(error.value))


def test_lora_initialization_depends_only_on_the_seed() -> None:
    def start(seed: int, dtype: str = "float32") -> torch.Tensor:
        path = ModelSpec(path="random:bert", dtype=dtype)  # type: ignore[arg-type]
        tensors = build_task_model(make_spec(model=path, seed=seed)).collect_adapter_parameters()
        return torch.cat([tensor.flatten() for name, tensor in tensors.items() if "lora_A" in name])

    state = torch.random.get_rng_state()
    first = start(1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first, start(1))
    assert not torch.equal(first, start(2))
    assert torch.allclose(first, start(1, "bfloat16"), rtol=1e-2)

"""Which matrices train, and how they start."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from fedtune.model import LoraSpec, ModelSpec, TaskModelSpec, attach_adapters, load_base
from fedtune.spec import ConfigError
from fedtune.tasks import build_task_model

Specs = Callable[..., TaskModelSpec]


def names(spec: TaskModelSpec) -> list[str]:
    return [name for name in build_task_model(spec).trainable() if name != "head.weight"]


@pytest.mark.parametrize("path", ["random:bert", "random:llama"])
def test_negative_layers_count_from_the_end(spec: Specs, path: str) -> None:
    def layer(*layers: int) -> list[str]:
        return names(spec(path, lora=LoraSpec(rank=2, layers=layers)))

    assert layer(-1) == layer(1)
    assert layer(-1, -2) == layer(0, 1) == names(spec(path, lora=LoraSpec(rank=2)))
    assert all(".1." in name for name in layer(-1))


def test_all_linear_stays_inside_the_layers(spec: Specs) -> None:
    for path, task, modules in (("random:bert", "classification", 6), ("random:llama", "causal_lm", 7)):
        found = names(spec(path, task))
        assert len(found) == 2 * 2 * modules
        assert not any(word in name for name in found for word in ("pooler", "embed", "lm_head"))


@pytest.mark.parametrize("target", ["q_proj", "embeddings", "LayerNorm", "uery"])
def test_a_target_that_matches_nothing_is_named(spec: Specs, target: str) -> None:
    with pytest.raises(ConfigError, match=r"lora\.target_modules.*dense, key, query, value") as caught:
        build_task_model(spec(lora=LoraSpec(target_modules=("query", target))))
    assert caught.value.value == target


@pytest.mark.parametrize("layer", [2, -3])
def test_a_layer_that_is_not_there_is_named(spec: Specs, layer: int) -> None:
    with pytest.raises(ConfigError, match=r"lora\.layers.*from -2 to 1"):
        build_task_model(spec(lora=LoraSpec(layers=(layer,))))


def test_frozen_a_leaves_only_b(spec: Specs) -> None:
    model = build_task_model(spec(lora=LoraSpec(rank=2, train_a=False)))
    assert all("lora_B" in name or name == "head.weight" for name in model.trainable())
    assert any("lora_A" in name for name in model.adapter_parameters())


def test_the_start_depends_on_the_seed_alone(spec: Specs) -> None:
    def start(seed: int, dtype: str = "float32") -> torch.Tensor:
        path = ModelSpec(path="random:bert", dtype=dtype)  # type: ignore[arg-type]
        tensors = build_task_model(spec(model=path, seed=seed)).adapter_parameters()
        return torch.cat([tensor.flatten() for name, tensor in tensors.items() if "lora_A" in name])

    state = torch.random.get_rng_state()
    first = start(1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first, start(1))
    assert not torch.equal(first, start(2))
    assert torch.allclose(first, start(1, "bfloat16"), rtol=1e-2)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_scale(rslora: bool) -> None:
    base = load_base(ModelSpec(path="random:bert"))
    spec = LoraSpec(rank=4, alpha=6.0, target_modules=("query",), rslora=rslora)
    model = attach_adapters(base, spec=spec, predicts_tokens=False, seed=0)
    layer = model.get_submodule("base_model.model.encoder.layer.0.attention.self.query")
    assert layer.scaling["default"] == pytest.approx(6.0 / (math.sqrt(4) if rslora else 4))


@pytest.mark.parametrize("rank", [33, 1_000_000])
def test_a_rank_above_every_module_s_is_refused_before_memory_is_taken(rank: int) -> None:
    """A rank of a million took 21 GB, and the machine ended the process with half a run folder."""
    spec = TaskModelSpec(
        model=ModelSpec(path="random:bert"), lora=LoraSpec(rank=rank), task="classification", labels=("a", "b")
    )
    with pytest.raises(ConfigError, match=rf"lora\.rank = {rank}: must be at most 32, the rank of the largest adapted"):
        build_task_model(spec)

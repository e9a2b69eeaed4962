from __future__ import annotations

from functools import partial

import pytest
import torch

from fedtune.data.batching import Batch
from fedtune.data.tokenise import TextDataset
from fedtune.model.layers import layer_stack
from fedtune.tasks import TaskModel

from .conftest import END, scores_of


def test_classification(classifier: TaskModel, labelled: TextDataset) -> None:
    weights = {name: value.clone() for name, value in classifier.state_dict().items()}
    flags = [module.training for module in classifier.modules()]
    scores = scores_of(classifier, labelled, pad_id=END, max_tokens=4096)
    assert set(scores) == {"accuracy", "macro_f1", "loss"}
    assert all(type(score) is float for score in scores.values())
    assert [module.training for module in classifier.modules()] == flags
    assert all(torch.equal(value, weights[name]) for name, value in classifier.state_dict().items())
    assert all(parameter.grad is None for parameter in classifier.parameters())


def test_no_module_runs_with_gradients_or_in_training_mode(classifier: TaskModel, labelled: TextDataset) -> None:
    seen: set[tuple[bool, bool]] = set()
    for module in classifier.modules():
        module.register_forward_hook(lambda ran, _, __: seen.add((ran.training, torch.is_grad_enabled())))
    scores_of(classifier, labelled, pad_id=END, max_tokens=4096)
    assert seen == {(False, False)}


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_frozen_layers_run_once_and_scores_are_the_same(request: pytest.FixtureRequest, task: str) -> None:
    model = request.getfixturevalue(f"last_layer_{'classifier' if task == 'classification' else 'language_model'}")
    data = request.getfixturevalue("labelled" if task == "classification" else "completions")
    frozen, *_ = layer_stack(model.base.get_base_model())[1]
    attention = next(module for name, module in frozen.named_children() if "attention" in name or "attn" in name)
    calls: list[None] = []
    attention.register_forward_hook(lambda *_: calls.append(None))
    kept: dict[int, Batch] = {}
    expected = scores_of(model, data, pad_id=END, max_tokens=64)
    ran: list[bool] = []
    for _ in range(3):
        calls.clear()
        found = scores_of(model, data, pad_id=END, max_tokens=64, kept=kept)
        assert found == pytest.approx(expected, rel=1e-6)
        ran.append(bool(calls))
    assert ran == [True, False, False]
    assert len(kept) > 1
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.mul_(2.0)
    again = scores_of(model, data, pad_id=END, max_tokens=64, kept=kept)
    assert again == pytest.approx(scores_of(model, data, pad_id=END, max_tokens=64), rel=1e-6)
    assert again != pytest.approx(expected, rel=1e-6), "what trains is scored anew"


def test_of_a_model_without_frozen_layers_nothing_is_kept(classifier: TaskModel, labelled: TextDataset) -> None:
    kept: dict[int, Batch] = {}
    score = partial(scores_of, classifier, labelled, pad_id=END, max_tokens=4096)
    assert score(kept=kept) == score()
    assert [(batch.prefix, batch.reference) for batch in kept.values()] == [(None, None)] * len(kept)
    assert kept

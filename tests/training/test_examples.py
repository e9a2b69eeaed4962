"""Keeping what the frozen layers make of each record changes no result beyond rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedtune.model import LoraSpec
from fedtune.training.dp_step import add_clipped, zeros
from fedtune.training.examples import SiteExamples
from fedtune.training.per_example import attached

CLIP, CELLS = 0.5, 2**24


def clipped_sum(model: Any, examples: SiteExamples, indices: list[int]) -> dict[str, torch.Tensor]:
    sums = zeros(model.trainable())
    with attached(model) as gradients:
        for batch in examples.cut(np.array(indices)):
            add_clipped(sums, gradients.of(batch), CLIP)
    return sums


@pytest.mark.parametrize(("path", "task"), [("random:bert", "classification"), ("random:llama", "causal_lm")])
def test_kept_states_give_the_same_clipped_sum(
    trained: Any, examples: Any, site_examples: Any, path: str, task: str
) -> None:
    model = trained(path, task, lora=LoraSpec(rank=2, alpha=4.0, layers=(-1,)))
    dataset = examples(task)
    plain = site_examples(dataset)
    keeping = site_examples(dataset)
    keeping.keep_frozen_states(model)
    chosen = [5, 1, 7, 2]
    assert all(batch.prefix is not None for batch in keeping.cut(np.array(chosen)))
    assert all(batch.prefix is None for batch in plain.cut(np.array(chosen)))
    expected = clipped_sum(model, plain, chosen)
    for name, total in clipped_sum(model, keeping, chosen).items():
        # Padding has other states, so a record is not always the same to the last bit with and without.
        assert int((total - expected[name]).abs().max()) <= 1e-5 * CELLS * len(chosen)
    assert any(int(total.abs().max()) > 1e-3 * CELLS for total in expected.values())


def test_each_record_keeps_its_own_states(fresh: Any, examples: Any, site_examples: Any) -> None:
    model = fresh(lora=LoraSpec(rank=2, alpha=4.0, layers=(-1,)))
    dataset = examples("classification")
    keeping = site_examples(dataset, max_tokens=10_000)
    keeping.keep_frozen_states(model)
    for index in range(len(dataset)):
        (batch,) = keeping.cut(np.array([index]))
        states = model.frozen_states(batch)
        real = batch.attention_mask[:1] == 1
        torch.testing.assert_close(batch.prefix[:1][real], states[:1][real], rtol=1e-5, atol=1e-5)


def test_padding_holds_no_other_records_states(fresh: Any, examples: Any, site_examples: Any) -> None:
    model = fresh(lora=LoraSpec(rank=2, alpha=4.0, layers=(-1,)))
    dataset = examples("classification")
    keeping = site_examples(dataset, max_tokens=10_000)
    keeping.keep_frozen_states(model)
    for batch in keeping.cut(np.arange(len(dataset))):
        assert batch.prefix is not None
        assert (batch.attention_mask == 0).any()
        assert not batch.prefix[batch.attention_mask == 0].any()
        assert not batch.prefix[len(batch) :].any(), "an empty row has none at all"


def test_nothing_is_kept_when_the_first_layer_trains(fresh: Any, examples: Any, site_examples: Any) -> None:
    keeping = site_examples(examples("classification"))
    keeping.keep_frozen_states(fresh())
    assert all(batch.prefix is None for batch in keeping.cut(np.array([0, 1])))

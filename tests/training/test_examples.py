"""Cached outputs of the frozen layers change no result beyond rounding."""

import errno
import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from fedtune.data import TextDataset
from fedtune.model.spec import LoraSpec
from fedtune.tasks.task_model import TaskModel
from fedtune.training.examples import SiteExamples

from .conftest import (
    BAD,
    CELLS,
    KINDS,
    LAST,
    build_fresh,
    build_trained,
    insert_token,
    make_dummy_examples,
    make_examples,
    sum_examples,
)

CLIP = 0.5
CHOSEN = [5, 1, 7, 2]


def require_same_sum(model: TaskModel, uncached: SiteExamples, keeping: SiteExamples, *, cells: float) -> None:
    """Require equal clipped sums of the selected records, within a tolerance per record in clip norms."""
    expected = sum_examples(model, uncached, CLIP, CHOSEN)
    for name, total in sum_examples(model, keeping, CLIP, CHOSEN).items():
        assert int((total - expected[name]).abs().max()) <= cells * CELLS * len(CHOSEN)
    assert any(int(total.abs().max()) > 1e-3 * CELLS for total in expected.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("path", "task"), KINDS)
def test_cached_states_do_not_change_the_clipped_sum(path: str, task: str, checkpointing: bool) -> None:
    model = build_trained(path, task, lora=LAST)
    if checkpointing:
        model.enable_gradient_checkpointing()
    dataset = make_dummy_examples(task)
    uncached, keeping = make_examples(dataset), make_examples(dataset)
    keeping.cache_frozen_states(model)
    assert all(batch.prefix is not None for batch in keeping.cut(np.array(CHOSEN)))
    assert all(batch.prefix is None for batch in uncached.cut(np.array(CHOSEN)))
    # Padding has other states, so a record's states may differ in the last bit.
    require_same_sum(model, uncached, keeping, cells=1e-5)


def test_states_cached_on_disk_match_memory_without_a_file_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, dataset = build_trained(lora=LAST), make_dummy_examples("classification")
    in_memory, on_disk, without_room = (make_examples(dataset) for _ in range(3))
    in_memory.cache_frozen_states(model)
    on_disk.cache_frozen_states(model, folder=tmp_path)
    assert on_disk._states.equal(in_memory._states)
    open_files = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert open_files, "the states must be in a file, not in memory"
    assert all("(deleted)" in line for line in open_files)
    for batch, expected in zip(in_memory.cut(np.arange(8)), on_disk.cut(np.arange(8)), strict=True):
        assert batch.prefix.equal(expected.prefix)
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(os, "posix_fallocate", full)
    without_room.cache_frozen_states(model, folder=tmp_path)
    assert all(batch.prefix is None for batch in without_room.cut(np.arange(4))), "a full disk must not be an error"
    assert list(tmp_path.iterdir()) == []


def test_padding_contains_no_states_and_progress_is_reported() -> None:
    model, dataset = build_fresh(lora=LAST), make_dummy_examples("classification")
    reported: list[tuple[int, int]] = []
    make_examples(dataset).cache_frozen_states(model, told=lambda *progress: reported.append(progress))
    assert len(reported) > 1
    assert [done for done, _ in reported] == sorted({done for done, _ in reported})
    assert {total for _, total in reported} == {len(dataset)} == {reported[-1][0]}
    keeping = make_examples(dataset, max_tokens=10_000)
    keeping.cache_frozen_states(model)
    for batch in keeping.cut(np.arange(len(dataset))):
        assert (batch.attention_mask == 0).any()
        assert not batch.prefix[batch.attention_mask == 0].any()
        assert not batch.prefix[len(batch) :].any(), "an empty row must have no states"


def make_bad_examples(task: str) -> tuple[TextDataset, int]:
    """Make examples of which one has the bad token in its last text; return them with its index."""
    dataset, index = make_dummy_examples(task), 3
    bad_texts, neighbor_texts = (dataset.find_text_indices([record]) for record in (index, index + 1))
    ids = list(dataset.input_ids)
    for text, expected in zip(bad_texts, neighbor_texts, strict=True):
        ids[text] = ids[expected]  # as long as another record, so both are in one batch
    return insert_token(TextDataset(tuple(ids), dataset.targets, dataset.texts), bad_texts[-1]), index


def require_no_effect(place: int, model: TaskModel, keeping: SiteExamples, mended: dict[str, torch.Tensor]) -> None:
    """Require that the bad record adds nothing, and that the other records add the same as next to a repaired
    record.
    """
    other_records = [index for index in range(len(keeping)) if index != place]
    assert not any(total.any() for total in sum_examples(model, keeping, CLIP, [place]).values())
    assert any(total.any() for total in mended.values())
    for chosen in (other_records, [place, *other_records]):
        found = sum_examples(model, keeping, CLIP, chosen)
        assert all(torch.equal(found[name], mended[name]) for name in mended)


class Panic(BaseException):
    """Exception like the panics of Rust libraries."""


def break_record(model: TaskModel, failure: str) -> None:
    """Make the embedding of the bad token fail or return NaN."""

    def fail_on_bad_token(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        is_bad = inputs[0] == BAD
        if is_bad.any() and failure != "not finite":
            raise {"an error": RuntimeError, "a panic": Panic}[failure]("no such token")
        return output.masked_fill(is_bad[..., None], float("nan"))

    model.base.get_base_model().get_input_embeddings().register_forward_hook(fail_on_bad_token)


@pytest.mark.by_day(
    "classification-an error-40", "classification-not finite-40", "pairs-not finite-40", "triplets-a panic-40"
)
@pytest.mark.parametrize("max_tokens", [40, 10_000])
@pytest.mark.parametrize("failure", ["an error", "a panic", "not finite"])
@pytest.mark.parametrize("task", ["classification", "pairs", "triplets"])
def test_record_with_failed_states_does_not_change_the_sum(task: str, failure: str, max_tokens: int) -> None:
    dataset, place = make_bad_examples(task)
    model = build_trained(task=task, lora=LAST)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # so that even zero states would have a gradient
            torch.nn.init.uniform_(parameter.detach())
    other_records = [index for index in range(len(dataset)) if index != place]
    uncached = make_examples(dataset, max_tokens=max_tokens)
    keeping = make_examples(dataset, max_tokens=max_tokens)
    mended = make_examples(insert_token(dataset), max_tokens=max_tokens)
    mended.cache_frozen_states(model)
    break_record(model, failure)
    keeping.cache_frozen_states(model)
    (single,) = keeping.cut(np.array([place]))
    assert not single.prefix[dataset.texts - 1].any()
    assert not any(total.any() for total in sum_examples(model, uncached, CLIP, [place]).values()), (
        "the record must not count without cached states, either"
    )
    require_no_effect(place, model, keeping, sum_examples(model, mended, CLIP, other_records))


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_machine_failure_discards_all_cached_states(error: type[Exception]) -> None:
    model = build_fresh(lora=LAST)
    fails = Mock(side_effect=error("out of memory"))
    handle = model.base.get_base_model().get_input_embeddings().register_forward_pre_hook(fails)
    keeping = make_examples(make_dummy_examples("classification"))
    with pytest.raises(error, match="out of memory"):
        keeping.cache_frozen_states(model)
    assert all(batch.prefix is None for batch in keeping.cut(np.array([0, 1])))
    handle.remove()
    keeping.cache_frozen_states(build_fresh())
    keeping.cache_reference(build_fresh())
    assert all(batch.prefix is batch.reference is None for batch in keeping.cut(np.array([0, 1]))), (
        "a model whose first layer trains must not cache states"
    )
    keeping.cache_frozen_states(model)
    assert all(batch.prefix is not None and batch.prefix.any() for batch in keeping.cut(np.array([0, 1])))


@pytest.mark.parametrize("layers", [None, (-1,)], ids=["uncached", "cached states"])
def test_cached_reference_does_not_change_the_clipped_sum(
    layers: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_trained("random:llama", "preference", lora=LoraSpec(rank=2, alpha=4.0, layers=layers))
    uncached, keeping = (make_examples(make_dummy_examples("preference")) for _ in range(2))
    if layers is not None:
        keeping.cache_frozen_states(model)
    keeping.cache_reference(model)
    assert all(batch.reference is not None for batch in keeping.cut(np.array(CHOSEN)))
    for factor in (1.0, -2.0):
        with torch.no_grad():
            for parameter in model.trainable().values():
                parameter.mul_(factor)
        require_same_sum(model, uncached, keeping, cells=1e-4)
    monkeypatch.setattr(TaskModel, "reference", lambda *_: pytest.fail("the base model ran again"))
    keeping.cache_reference(model)
    assert any(total.any() for total in sum_examples(model, keeping, CLIP, [1, 2, 3]).values())


@pytest.mark.by_day("an error-40", "not finite-40", "a panic-40")
@pytest.mark.parametrize("max_tokens", [40, 10_000])
@pytest.mark.parametrize("failure", ["an error", "a panic", "not finite"])
def test_record_with_a_failed_reference_does_not_change_the_sum(failure: str, max_tokens: int) -> None:
    model, dataset, place = build_trained("random:llama", "preference"), make_dummy_examples("preference"), 3
    other_records = [index for index in range(len(dataset)) if index != place]
    mended, keeping = (
        make_examples(record, max_tokens=max_tokens)
        for record in (insert_token(dataset), insert_token(dataset, 2 * place + 1))
    )
    mended.cache_reference(model)
    expected = sum_examples(model, mended, CLIP, other_records)
    break_record(model, failure)
    keeping.cache_reference(model)
    (single,) = keeping.cut(np.array([place]))
    assert not single.reference[0].isfinite().all()
    require_no_effect(place, model, keeping, expected)

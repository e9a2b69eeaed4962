import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.data import TextDataset, collate
from fedtune.data.batching import cut_micro_batches, isolate_example
from fedtune.data.tokenization import UNSUPERVISED

PAD = 3  # also the last token of every example, as in chat models whose padding is the end-of-text token
IDS = tuple(np.array(ids, dtype=np.int32) for ids in ([5, 6, PAD], [7, PAD], [8, 9, 4, PAD]))
CLASSES = TextDataset(IDS, np.array([0, 2, 1]))
TOKENS = TextDataset(IDS, tuple(np.where(ids > 6, ids, UNSUPERVISED).astype(np.int64) for ids in IDS))

SEVERAL = TextDataset((*IDS, *IDS[::-1]), np.array([0.5, 0.25, 1.0], dtype=np.float32), 2)
TOKENS_EACH = TextDataset((*IDS, *IDS[::-1]), (*TOKENS.targets, *TOKENS.targets[::-1]), 2)


def test_multi_text_record_has_the_length_of_its_longest_text() -> None:
    assert (len(SEVERAL), SEVERAL.num_tokens) == (3, 18)
    assert SEVERAL.text_lengths.tolist() == [[3, 2], [4, 4], [2, 3]]
    assert SEVERAL.lengths.tolist() == [3, 4, 3]
    assert SEVERAL.find_text_indices([2, 0]).tolist() == [4, 5, 0, 1]
    selected = SEVERAL.select_examples([2, 0])
    assert [ids.tolist() for ids in selected.input_ids] == [SEVERAL.input_ids[text].tolist() for text in (4, 5, 0, 1)]
    assert (selected.texts, selected.targets.tolist()) == (2, [1.0, 0.5])
    assert [len(row) for row in TOKENS_EACH.select_examples([1]).targets] == [4, 4]
    with pytest.raises(AssertionError, match="one target"):
        TextDataset(IDS, np.zeros(3), 2)
    assert len(TextDataset((), np.zeros(0), 3)) == 0


def test_collate_places_texts_of_a_record_in_consecutive_rows() -> None:
    batch = collate(SEVERAL, [2, 0], pad_id=0, shape=(3, 5))
    assert (len(batch), batch.texts, batch.empty_rows) == (2, 2, 2)
    assert batch.attention_mask.sum(dim=1).tolist() == [2, 3, 3, 2, 1, 1]
    assert batch.input_ids[1].tolist() == [5, 6, PAD, 0, 0]
    assert batch.targets.tolist() == [1.0, 0.5, 0.0]
    assert (len(batch.to("meta")), batch.to("meta").texts) == (2, 2)
    tokens = collate(TOKENS_EACH, [0], pad_id=0, shape=(2, 4))
    assert tokens.targets.shape == (4, 4)
    assert (tokens.targets[2:] == UNSUPERVISED).all()


def test_collate_pads_on_the_right() -> None:
    batch = collate(CLASSES, np.array([1, 0]), pad_id=PAD)
    assert batch.input_ids.tolist() == [[7, PAD, PAD], [5, 6, PAD]]
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.targets.tolist() == [2, 0]
    assert len(batch) == 2
    batch.targets.zero_()
    assert CLASSES.targets.tolist() == [0, 2, 1], "the batch must not share memory with the data set"
    batch = collate(TOKENS, [2, 1], pad_id=0)
    assert batch.targets.tolist() == [[8, 9, UNSUPERVISED, UNSUPERVISED], [7] + [UNSUPERVISED] * 3]
    assert batch.input_ids.tolist() == [[8, 9, 4, PAD], [7, PAD, 0, 0]]


@pytest.mark.parametrize(("dataset", "shape"), [(CLASSES, (0,)), (TOKENS, (0, 1))])
@pytest.mark.parametrize("no_indices", [[], np.array([], dtype=np.int64)])
def test_empty_batch_has_the_usual_dtypes(dataset: TextDataset, shape: tuple[int, ...], no_indices: Any) -> None:
    batch = collate(dataset, no_indices, pad_id=0)
    assert batch.input_ids.shape == batch.attention_mask.shape == (0, 1)
    assert batch.targets.shape == shape
    assert {batch.input_ids.dtype, batch.attention_mask.dtype, batch.targets.dtype} == {torch.int64}
    features = torch.nn.Embedding(10, 4)(batch.input_ids)
    assert features.shape == (0, 1, 4)
    features.sum().backward()


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.data(), st.integers(1, 80))
def test_micro_batches_only_regroup_records(lengths: list[int], chosen: st.DataObject, max_tokens: int) -> None:
    table = np.array(lengths, dtype=np.int32)
    indices = chosen.draw(st.lists(st.integers(0, len(lengths) - 1), unique=True))
    cut = cut_micro_batches(np.array(indices, dtype=np.int64), table, max_tokens=max_tokens)
    assert sorted(index for batch in cut for index in batch.tolist()) == sorted(indices)
    for batch in cut:
        assert len(batch) >= 1
        assert len(batch) == 1 or len(batch) * table[batch].max() <= max_tokens
    flat = [(lengths[index], index) for batch in cut for index in batch.tolist()]
    assert flat == sorted(flat)


@pytest.mark.parametrize("dataset", [CLASSES, TOKENS], ids=["classes", "tokens"])
def test_batch_with_a_fixed_shape_is_filled_with_empty_rows(dataset: TextDataset) -> None:
    batch = collate(dataset, [1, 0], pad_id=PAD, shape=(4, 8))
    assert (len(batch), batch.empty_rows) == (2, 2)
    assert batch.input_ids.shape == batch.attention_mask.shape == (4, 8)
    assert batch.input_ids[2:].eq(PAD).all()
    assert batch.attention_mask.sum(dim=1).tolist() == [2, 3, 1, 1]
    assert batch.targets[2:].eq(0 if dataset is CLASSES else UNSUPERVISED).all()
    small = collate(dataset, [1, 0], pad_id=PAD)
    assert torch.equal(batch.input_ids[:2, :3], small.input_ids)
    assert (len(batch.to("meta")), batch.to("meta").empty_rows) == (2, 2)


@pytest.mark.parametrize("dataset", [CLASSES, TOKENS, SEVERAL, TOKENS_EACH], ids=["class", "tokens", "value", "both"])
@pytest.mark.parametrize("index", [0, 1, None])
def test_isolated_example_keeps_its_shape_without_other_records(dataset: TextDataset, index: int | None) -> None:
    rows, count = 4 * dataset.texts, int(index is not None)
    batch = collate(dataset, [2, 0], pad_id=9, shape=(4, 8))
    prefix = torch.arange(rows * 8 * 2, dtype=torch.float32).reshape(rows, 8, 2) + 1
    batch = dataclasses.replace(batch, prefix=prefix.clone())
    isolated = isolate_example(batch, index)
    assert (len(isolated), isolated.texts, isolated.empty_rows) == (count, dataset.texts, rows - count * dataset.texts)
    for name in ("input_ids", "attention_mask", "targets", "prefix"):
        value, full = getattr(isolated, name), getattr(batch, name)
        size = len(full) // 4
        assert value.shape == full.shape
        if index is not None:
            assert torch.equal(value[:size], full[index * size : (index + 1) * size]), name
        assert name == "attention_mask" or not value[count * size :].any(), name
    rest = isolated.attention_mask[count * dataset.texts :]
    assert rest[:, 0].eq(1).all()
    assert rest.sum(dim=1).eq(1).all()
    assert torch.equal(batch.prefix, prefix), "the batch must not be changed"

"""An adapter packed for the wire comes out as it went in; bytes that are no such pack come out as they are."""

from __future__ import annotations

import json
import struct
import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as some

from fedtune.flower import records
from fedtune.flower.packing import packed, unpacked

PACK = "fedtune-packed-1"
WORDS = ConfigRecord({"json": "{}", "signature": "00"})

float32 = some.arrays(np.float32, some.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
tensors = st.dictionaries(st.text(max_size=30), float32, min_size=1, max_size=8)


def content_of(values: dict[str, npt.NDArray[Any]]) -> RecordDict:
    """A message with an adapter between two other records."""
    arrays = ArrayRecord({name: Array(value) for name, value in values.items()})
    return RecordDict({records.REQUEST: WORDS, records.ARRAYS: arrays, records.SETTINGS: WORDS})


def arrays_of(content: RecordDict) -> list[tuple[str, tuple[int, ...], str, bytes]]:
    """Names, shapes, types and bytes, in their order."""
    record = content.array_records[records.ARRAYS]
    found = [(name, array.numpy()) for name, array in record.items()]
    return [(name, value.shape, str(value.dtype), value.tobytes()) for name, value in found]


@given(values=tensors)
def test_what_is_packed_is_unpacked_to_the_bit_and_in_its_order(values: dict[str, npt.NDArray[np.float32]]) -> None:
    content = content_of(values)
    wire = packed(content)
    assert list(wire.array_records[records.ARRAYS]) == [PACK]
    back = unpacked(wire)
    assert arrays_of(back) == arrays_of(content)
    assert list(back) == list(wire) == list(content)
    assert back[records.REQUEST] == WORDS
    assert records.num_bytes(wire) >= sum(value.nbytes for value in values.values())


def test_a_pack_is_one_object_hardly_larger_than_its_arrays() -> None:
    values = {f"layer.{n}.lora_A": np.ones((8, 16), np.float32) for n in range(50)}
    (array,) = packed(content_of(values)).array_records[records.ARRAYS].values()
    assert len(array.data) < 50 * (8 * 16 * 4 + 60)


def test_views_are_packed_by_their_values() -> None:
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    for view in (whole.T, whole[:, ::2], whole[::-1]):
        assert arrays_of(unpacked(packed(content_of({"a": view})))) == arrays_of(content_of({"a": view.copy()}))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32, np.uint8, ">f4"])
def test_other_numbers_are_left_alone(dtype: Any) -> None:
    content = content_of({"a": np.ones(3, np.float32), "b": np.ones(3, dtype)})
    assert packed(content) is content
    assert unpacked(content) is content


def test_a_message_without_arrays_is_left_alone() -> None:
    for content in (RecordDict(), RecordDict({records.REQUEST: WORDS}), RecordDict({records.ARRAYS: ArrayRecord()})):
        assert packed(content) is content
        assert unpacked(content) is content


def test_nothing_else_in_a_message_is_taken_for_a_pack() -> None:
    beside = RecordDict({"other": packed(content_of({"a": np.ones(3, np.float32)}))[records.ARRAYS]})
    assert unpacked(beside) is beside
    words = RecordDict({records.ARRAYS: WORDS})
    assert packed(words) is words
    assert unpacked(words) is words


# What a hostile server or site may send.


def holding(data: bytes) -> RecordDict:
    """A message whose pack is `data`."""
    joined = Array(np.frombuffer(data, dtype=np.uint8))
    return RecordDict({records.REQUEST: WORDS, records.ARRAYS: ArrayRecord({PACK: joined})})


def framed(header: object, body: bytes = b"", *, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


HOSTILE = {
    "nothing": b"",
    "half a length": b"\x01\x00",
    "a length beyond the end": framed([], size=1 << 63),
    "no JSON": framed(b"{'a': 1}"),
    "no UTF-8": framed(b"\xff\xfe\xfa"),
    "nested without end": framed(b"[" * 100_000),
    "a number": framed(3),
    "an object": framed({"ab": 1}),
    "entries of three": framed([["a", [1], 0]], b"\0" * 4),
    "a name that is a number": framed([[1, [1]]], b"\0" * 4),
    "a name that is null": framed([[None, [1]]], b"\0" * 4),
    "a shape that is a number": framed([["a", 1]], b"\0" * 4),
    "a shape that is text": framed([["a", ""]], b"\0" * 4),
    "NaN": framed(b'[["a", [NaN]]]', b"\0" * 4),
    "infinity": framed(b'[["a", [Infinity]]]', b"\0" * 4),
    "a fraction": framed([["a", [1.0]]], b"\0" * 4),
    "true": framed([["a", [True]]], b"\0" * 4),
    "a negative length": framed([["a", [-1]]], b"\0" * 4),
    "two negative lengths": framed([["a", [-1, -1]]], b"\0" * 4),
    "petabytes": framed([["a", [1 << 50]]], b"\0" * 4),
    "petabytes of nothing": framed([["a", [0, 1 << 62, 1 << 62]]]),
    "beyond 64 bits": framed([["a", [1 << 40, 1 << 40]]], b"\0" * 4),
    "too little": framed([["a", [2]]], b"\0" * 4),
    "too much": framed([["a", [1]]], b"\0" * 8),
    "half a number": framed([["a", [1]]], b"\0" * 6),
    "a name twice": framed([["a", [1]], ["a", [1]]], b"\0" * 8),
    "seventy dimensions": framed([["a", [1] * 70]], b"\0" * 4),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_what_is_no_pack_comes_back_as_it_is_at_no_cost(fault: str) -> None:
    content = holding(HOSTILE[fault])
    tracemalloc.start()
    try:
        assert unpacked(content) is content
        assert tracemalloc.get_traced_memory()[1] < 16 * len(HOSTILE[fault]) + 200_000
    finally:
        tracemalloc.stop()


def test_a_pack_of_nothing_is_a_pack() -> None:
    # So that the faults above are what is refused, and not their form.
    assert arrays_of(unpacked(holding(framed([])))) == []
    (one,) = arrays_of(unpacked(holding(framed([["a", [2, 0]]]))))
    assert one[:3] == ("a", (2, 0), "float32")


@given(data=st.binary(max_size=200))
def test_no_bytes_raise(data: bytes) -> None:
    content = holding(data)
    assert unpacked(content) is content


@given(values=tensors, data=st.data())
def test_a_pack_that_was_cut_or_changed_never_raises(
    values: dict[str, npt.NDArray[np.float32]], data: st.DataObject
) -> None:
    (array,) = packed(content_of(values)).array_records[records.ARRAYS].values()
    whole = array.numpy().tobytes()
    cut = holding(whole[: data.draw(st.integers(0, len(whole) - 1))])
    assert unpacked(cut) is cut
    spot = data.draw(st.integers(0, len(whole) - 1))
    unpacked(holding(whole[:spot] + bytes([whole[spot] ^ data.draw(st.integers(1, 255))]) + whole[spot + 1 :]))


def test_arrays_that_cannot_be_read_are_left_to_whoever_reads_them() -> None:
    for array in (
        Array("uint8", (4,), "numpy.ndarray", b"no numpy file"),
        Array("uint8", (4,), "pickle", b"cos\nsystem\n"),
    ):
        content = RecordDict({records.ARRAYS: ArrayRecord({PACK: array})})
        assert unpacked(content) is content

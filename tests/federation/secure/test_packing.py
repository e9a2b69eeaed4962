"""Residues travel in as many bits as the modulus has, and come back as they were."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.federation.secure.packing import packed, packed_bytes, reduced, residues, signed, unpacked

BITS = st.integers(1, 64)


@settings(deadline=None)
@given(BITS, st.lists(st.integers(0, 2**64 - 1), max_size=40))
def test_what_was_packed_comes_back_in_the_fewest_whole_bytes(bits: int, values: list[int]) -> None:
    numbers = reduced(np.array(values, np.uint64), bits)
    data = packed(numbers, bits)
    assert len(data) == packed_bytes(len(values), bits) == (len(values) * bits + 7) // 8
    assert unpacked(data, len(values), bits).tolist() == [value % 2**bits for value in values]
    as_one = sum(int(number) << place * bits for place, number in enumerate(numbers))
    assert int.from_bytes(data, "little") == as_one, "bits lie one behind the other"


@pytest.mark.parametrize("bits", [1, 17, 31, 33, 64])
def test_long_vectors_are_packed_piece_by_piece(bits: int) -> None:
    count = (1 << 17) + 5
    numbers = reduced(np.random.default_rng(bits).integers(0, 2**64, count, dtype=np.uint64), bits)
    assert np.array_equal(unpacked(packed(numbers, bits), count, bits), numbers)


def test_other_bytes_are_no_vector() -> None:
    data = packed(np.array([1, 2, 3], np.uint64), 3)
    assert len(data) == 2
    for other in (data + b"\0", data[:1], bytes([data[0], data[1] | 0x80])):
        with pytest.raises(ValueError, match=r"length|bits beyond"):
            unpacked(other, 3, 3)


@given(BITS, st.data())
def test_signs_come_back(bits: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), max_size=9))
    assert signed(residues(np.array(values, np.int64), bits), bits).tolist() == values

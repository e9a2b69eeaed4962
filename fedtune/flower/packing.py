"""An adapter as one object on the wire.

Flower sends each array of a message by several calls of its own; an adapter has dozens of small ones.
"""

from __future__ import annotations

import json
import math
import struct

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict

from fedtune.flower.records import ARRAYS

_PACKED = "fedtune-packed-1"
_FLOAT32 = "<f4"
_MOST_HEADER_BYTES = 1 << 20
"""Names and shapes become Python objects, which are many times as large."""


def packed(content: RecordDict) -> RecordDict:
    """`content` with its float32 arrays joined to one of bytes; itself where it has other arrays, or none."""
    if ARRAYS not in content.array_records:
        return content
    values = {name: array.numpy() for name, array in content.array_records[ARRAYS].items()}
    if not values or any(value.dtype != np.float32 for value in values.values()):
        return content
    header = json.dumps([[name, list(value.shape)] for name, value in values.items()]).encode()
    body = b"".join(np.ascontiguousarray(value, dtype=_FLOAT32).tobytes() for value in values.values())
    joined = np.frombuffer(struct.pack("<Q", len(header)) + header + body, dtype=np.uint8)
    return RecordDict({**content, ARRAYS: ArrayRecord({_PACKED: Array(joined)})})


def unpacked(content: RecordDict) -> RecordDict:
    """The inverse; `content` itself where it is not packed, or not properly: who reads it then says what it lacks."""
    try:
        (joined,) = (array.numpy() for name, array in content.array_records[ARRAYS].items() if name == _PACKED)
        arrays = _arrays(joined.tobytes())
    except Exception:  # numpy alone raises five kinds over bytes that are no array
        return content
    return RecordDict({**content, ARRAYS: arrays})


def _arrays(data: bytes) -> ArrayRecord:
    (size,) = struct.unpack_from("<Q", data)
    if size > _MOST_HEADER_BYTES:
        raise ValueError("header")
    offset, arrays = 8 + size, {}
    header = json.loads(data[8:offset])
    for name, shape in header:
        if type(name) is not str or type(shape) is not list:
            raise ValueError("entry")
        if not all(type(length) is int and length >= 0 for length in shape):
            raise ValueError("shape")
        count = math.prod(shape)
        values = np.frombuffer(data, dtype=_FLOAT32, count=count, offset=offset)
        arrays[name] = Array(values.astype(np.float32).reshape(shape))
        offset += 4 * count
    if offset != len(data) or len(arrays) != len(header):
        raise ValueError("length")
    return ArrayRecord(arrays)

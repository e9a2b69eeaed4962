"""What is added to an adapter to make another, in 8 or 4 bits a value: as updates and adapters travel.

A site rounds after the noise, and the lead what it averaged: post-processing of what the budget has paid for.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedtune.privacy.packing import packed, packed_bytes, residues, signed, unpacked
from fedtune.privacy.randomness import RandomStream

Tensors = Mapping[str, npt.NDArray[np.float32]]

BITS = (32, 8, 4)
"""Of a value that travels; with 32 adapters travel whole, as float32."""
MOST_HEADER_BYTES = 1 << 20
"""Names and shapes become Python objects, which are many times as large."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Whole numbers, each times its tensor's step.

    Attributes:
        bits: 8 or 4, of each number.
        steps: name of a tensor -> its step, a float32; 0 where nothing changed.
        levels: name of a tensor -> numbers from -127 to 127, or from -7 to 7.
    """

    bits: int
    steps: Mapping[str, float]
    levels: Mapping[str, npt.NDArray[np.int8]]

    @classmethod
    def between(cls, begin: Tensors, end: Tensors, *, bits: int, about: str) -> Difference:
        """From `begin` to `end`, with the names of `begin`: right on average, and each value off by less than a step.

        Whether a value is rounded up or down is drawn from a hash of `end` and `about`, so that asked again it is the
        same.  Values that are not finite make their whole tensor so.
        """
        steps, levels = {}, {}
        random = RandomStream(_key(end, about))
        for name, start in begin.items():
            moved = end[name].astype(np.float64) - start
            step = _step(moved, most_level(bits))
            drawn = (random.uniform64(moved.size) >> np.uint64(11)).reshape(moved.shape) * 2.0**-53
            scaled = np.floor(moved / step + drawn) if 0 < step < math.inf else np.zeros(moved.shape)
            steps[name], levels[name] = step, scaled.astype(np.int8)
        return cls(bits=bits, steps=steps, levels=levels)

    def fits(self, begin: Tensors) -> bool:
        """Whether it has the names and shapes of `begin`, in their order, and steps by which one can move."""
        own, others = ([(name, value.shape) for name, value in one.items()] for one in (self.levels, begin))
        return own == others and all(0 <= step < math.inf for step in self.steps.values())

    def added_to(self, begin: Tensors) -> dict[str, npt.NDArray[np.float32]]:
        """What it makes of `begin`, which must have the same names and shapes: the same bits on every machine."""
        with np.errstate(over="ignore", invalid="ignore"):  # anybody may have sent it; the result is checked
            # A product and a sum, each rounded to float32: in one instruction they would come to other bits.
            moved = {name: np.float32(self.steps[name]) * self.levels[name].astype(np.float32) for name in begin}
            return {name: start + moved[name] for name, start in begin.items()}

    def to_bytes(self) -> bytes:
        """Canonical bytes: header length, JSON header, then one tensor's numbers after the other.

        A number takes a byte, or half of one: the first of two lies in the lower half.
        """
        header, parts = self._header(), [levels.ravel().astype(np.int64) for levels in self.levels.values()]
        numbers = [packed(residues(part, self.bits), self.bits) for part in parts]
        return b"".join([struct.pack("<Q", len(header)), header, *numbers])

    def _header(self) -> bytes:
        tensors = [[name, list(value.shape), self.steps[name]] for name, value in self.levels.items()]
        return json.dumps({"bits": self.bits, "tensors": tensors}).encode()

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Difference:
        """The difference that `to_bytes` wrote.

        Raises:
            ValueError, TypeError, KeyError, OverflowError, struct.error: anything else.
        """
        (size,) = struct.unpack("<Q", data[:8])
        if size > MOST_HEADER_BYTES:
            raise ValueError("header size")
        header = json.loads(bytes(data[8 : 8 + size]))
        bits, tensors = header["bits"], header["tensors"]
        if bits not in BITS[1:]:
            raise ValueError("bits")
        rest, steps, levels = memoryview(data)[8 + size :], {}, {}
        for name, shape, step in tensors:
            if not all(isinstance(length, int) and length >= 0 for length in shape):
                raise ValueError("shape")
            levels[str(name)], rest = _levels(rest, tuple(shape), bits)
            steps[str(name)] = float(step)
        found = cls(bits=int(bits), steps=steps, levels=levels)
        # One difference has one encoding: no field beside these, no other type or spacing carries anything.
        if rest or found._header() != data[8 : 8 + size]:
            raise ValueError("header")
        return found


def most_level(bits: int) -> int:
    """The largest of the numbers; the smallest is as far from 0."""
    return (1 << bits - 1) - 1


def _step(moved: npt.NDArray[np.float64], most: int) -> float:
    """The step at which the largest level is the largest value, rounded up to a float32: less would not reach it."""
    if not moved.any():
        return 0.0
    return float(np.nextafter(np.float32(np.abs(moved).max() / most), np.float32(math.inf)))


def _key(end: Tensors, about: str) -> bytes:
    digest = hashlib.sha256(about.encode())
    for value in end.values():
        digest.update(np.ascontiguousarray(value, dtype="<f4").data)
    return digest.digest()


def _levels(data: memoryview, shape: tuple[int, ...], bits: int) -> tuple[npt.NDArray[np.int8], memoryview]:
    """A tensor's numbers at the beginning of `data`, and what follows them."""
    count = math.prod(shape)
    size = packed_bytes(count, bits)
    levels = signed(unpacked(data[:size], count, bits), bits)
    if levels.min(initial=0) < -most_level(bits):
        raise ValueError("a level")
    return levels.astype(np.int8).reshape(shape), data[size:]

"""Whole numbers modulo a power of two, and their bytes: as many bits for each as the modulus has."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Residues = npt.NDArray[np.uint64]
_AT_ONCE = 1 << 16  # values whose bits are in memory as bytes; a multiple of 8, so that each piece ends with a byte


def reduced(numbers: Residues, bits: int) -> Residues:
    """Numbers modulo 2**64, modulo 2**bits."""
    return numbers & np.uint64(2**bits - 1)


def signed(numbers: Residues, bits: int) -> npt.NDArray[np.int64]:
    """The numbers from -2**(bits-1) up to but not 2**(bits-1) that have these residues."""
    unused = np.uint64(64 - bits)
    return (numbers << unused).view(np.int64) >> unused.astype(np.int64)


def packed_bytes(count: int, bits: int) -> int:
    """How many bytes `count` residues take."""
    return -(-count * bits // 8)


def packed(numbers: Residues, bits: int) -> bytes:
    """The residues, one behind the other, lowest bit first; what is left of the last byte is zero."""
    octets = -(-bits // 8)
    pieces = []
    for start in range(0, len(numbers), _AT_ONCE):
        rows = numbers[start : start + _AT_ONCE].astype("<u8").view(np.uint8).reshape(-1, 8)[:, :octets]
        rows_of_bits = np.unpackbits(rows, axis=1, bitorder="little")[:, :bits]
        pieces.append(np.packbits(rows_of_bits.reshape(-1), bitorder="little").tobytes())
    return b"".join(pieces)


def unpacked(data: bytes | memoryview, count: int, bits: int) -> Residues:
    """The residues that `packed` wrote, (count,).

    Raises:
        ValueError: not exactly such bytes.
    """
    if len(data) != packed_bytes(count, bits):
        raise ValueError("length")
    numbers = np.zeros((count, 8), np.uint8)
    octets, stored = -(-bits // 8), np.frombuffer(data, np.uint8)
    for start in range(0, count, _AT_ONCE):
        rows = min(_AT_ONCE, count - start)
        piece = stored[start * bits // 8 : start * bits // 8 + packed_bytes(rows, bits)]
        rows_of_bits = np.unpackbits(piece, bitorder="little")
        if rows_of_bits[rows * bits :].any():
            raise ValueError("bits beyond the last value")
        filled = np.packbits(rows_of_bits[: rows * bits].reshape(rows, bits), axis=1, bitorder="little")
        numbers[start : start + rows, :octets] = filled
    return numbers.view("<u8").reshape(-1).astype(np.uint64, copy=False)

"""Bit packing of integers modulo 2**bits, with `bits` bits per integer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Residues = npt.NDArray[np.uint64]
_AT_ONCE = 1 << 16  # values unpacked to bits at a time; a multiple of 8, so that every piece ends at a byte boundary


def reduce_residues(numbers: Residues, bits: int) -> Residues:
    """Reduce uint64 numbers modulo 2**bits."""
    return numbers & np.uint64(2**bits - 1)


def to_signed_integers(numbers: Residues, bits: int) -> npt.NDArray[np.int64]:
    """Convert residues to signed integers in [-2**(bits-1), 2**(bits-1))."""
    unused = np.uint64(64 - bits)
    return (numbers << unused).view(np.int64) >> unused.astype(np.int64)


def compute_packed_size(count: int, bits: int) -> int:
    """Return the number of bytes for `count` packed residues."""
    return -(-count * bits // 8)


def pack_residues(numbers: Residues, bits: int) -> bytes:
    """Pack residues contiguously, lowest bit first; unused bits of the last byte are zero."""
    octets = -(-bits // 8)
    pieces = []
    for start in range(0, len(numbers), _AT_ONCE):
        rows = numbers[start : start + _AT_ONCE].astype("<u8").view(np.uint8).reshape(-1, 8)[:, :octets]
        rows_of_bits = np.unpackbits(rows, axis=1, bitorder="little")[:, :bits]
        pieces.append(np.packbits(rows_of_bits.reshape(-1), bitorder="little").tobytes())
    return b"".join(pieces)


def unpack_residues(data: bytes | memoryview, count: int, bits: int) -> Residues:
    """Unpack `count` residues from the output of `pack_residues`; shape (count,).

    Raises:
        ValueError: the bytes have another length, or unused bits are set.
    """
    if len(data) != compute_packed_size(count, bits):
        raise ValueError("the packed data has the wrong length")
    numbers = np.zeros((count, 8), np.uint8)
    octets, stored = -(-bits // 8), np.frombuffer(data, np.uint8)
    for start in range(0, count, _AT_ONCE):
        rows = min(_AT_ONCE, count - start)
        piece = stored[start * bits // 8 : start * bits // 8 + compute_packed_size(rows, bits)]
        rows_of_bits = np.unpackbits(piece, bitorder="little")
        if rows_of_bits[rows * bits :].any():
            raise ValueError("unused bits of the last byte are set")
        filled = np.packbits(rows_of_bits[: rows * bits].reshape(rows, bits), axis=1, bitorder="little")
        numbers[start : start + rows, :octets] = filled
    return numbers.view("<u8").reshape(-1).astype(np.uint64, copy=False)

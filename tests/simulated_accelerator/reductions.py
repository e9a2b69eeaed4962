"""The order in which CUDA adds up rows of float64 for a norm (Reduce.cuh of torch): it goes by how many there are."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
_MULTIPROCESSORS, _THREADS_OF_EACH, _MOST_THREADS, _WARP = 132, 2048, 512, 32  # of an H100


def norms(rows: Values) -> Values:
    """(n,) norms of n rows, as such a GPU would have them."""
    return np.array([np.sqrt(_sum_of_squares(row, len(rows))) for row in rows])


def _sum_of_squares(row: Values, count: int) -> float:
    width, height, blocks, by_four = _layout(count, len(row))
    threads = width * height * blocks
    each = np.zeros((threads, 4))
    whole = len(row) // 4 * 4 if by_four else 0
    for first in range(0, whole, 4 * threads):
        part = row[first : min(first + 4 * threads, whole)].reshape(-1, 4)
        each[: len(part)] += part * part
    for place, first in enumerate(range(whole, len(row), threads)):
        part = row[first : first + threads]
        each[: len(part), 0 if by_four else place % 4] += part * part
    sums = (((each[:, 0] + each[:, 1]) + each[:, 2]) + each[:, 3]).reshape(blocks, height, width)
    of_blocks = np.array([_of_a_block(block) for block in sums])
    if blocks == 1:
        return float(of_blocks[0])
    last = np.zeros(width * height)  # the block that ends last adds up what the others left
    for first in range(0, blocks, len(last)):
        part = of_blocks[first : first + len(last)]
        last[: len(part)] += part
    return _of_a_block(last.reshape(-1, width))


def _of_a_block(sums: Values) -> float:
    """Half to half: its warps, then the threads of one."""
    while len(sums) > 1:
        sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
    of_warp, step = sums[0], 1
    while len(of_warp) > _WARP:
        of_warp = of_warp[: len(of_warp) // 2] + of_warp[len(of_warp) // 2 :]
    while step < len(of_warp):
        of_warp = of_warp + np.roll(of_warp, -step)
        step *= 2
    return float(of_warp[0])


def _layout(count: int, length: int) -> tuple[int, int, int, bool]:
    """Threads of a block, across and down, the blocks of a row, and whether four values are read at a time."""
    by_four = length >= 128

    def power(most: int) -> int:
        return min(1 << (most.bit_length() - 1), _MOST_THREADS)

    across, down = power(length // 4 if by_four else length), power(count)
    width = min(across, _WARP)
    height = min(down, _MOST_THREADS // width)
    width = min(across, _MOST_THREADS // height)
    if -(-length // width) < min(height * 16, 256):
        return width, 1, 1, by_four
    steps = -(-length // (width * height))
    wanted = _MULTIPROCESSORS * (_THREADS_OF_EACH // (width * height))
    blocks = 1
    if steps >= 256 and count <= wanted:
        blocks = max(min(-(-wanted // count), -(-steps // 16)), -(-steps // 256), 1)
    return width, height, blocks, by_four

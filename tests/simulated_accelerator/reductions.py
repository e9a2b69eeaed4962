"""The order in which CUDA adds up rows of float64 for a norm (Reduce.cuh of torch): it goes by how many there are."""

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
_MOST_THREADS, _WARP = 512, 32  # of a block


def norms(rows: Values) -> Values:
    """(n,) norms of n rows of 128 to some 100,000 values, a multiple of four, each of which one block adds up."""
    return np.array([np.sqrt(_sum_of_squares(row, len(rows))) for row in rows])


def _sum_of_squares(row: Values, count: int) -> float:
    across, down = (min(1 << (most.bit_length() - 1), _MOST_THREADS) for most in (len(row) // 4, count))
    height = min(down, _MOST_THREADS // _WARP)
    width = min(across, _MOST_THREADS // height)
    if -(-len(row) // width) < min(height * 16, 256):
        height = 1
    each = np.zeros((width * height, 4))  # a thread reads four values at a time
    for first in range(0, len(row), each.size):
        part = row[first : first + each.size].reshape(-1, 4)
        each[: len(part)] += part * part
    sums = (((each[:, 0] + each[:, 1]) + each[:, 2]) + each[:, 3]).reshape(height, width)
    while len(sums) > 1:
        sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
    of_row = sums[0]
    while len(of_row) > _WARP:
        of_row = of_row[: len(of_row) // 2] + of_row[len(of_row) // 2 :]
    while len(of_row) > 1:
        of_row = of_row[::2] + of_row[1::2]
    return float(of_row[0])

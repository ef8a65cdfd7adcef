"""Filters of codes applied on a CPU, compiled by numba.

Arrays of this file:

    image[row, column, 3]              padded by half the side of a filter
    indices[pixel, neighbour]          the nearest codes of each pixel
    table[code, input, 3]              filters: by row, column and channel, then a constant
    corrections[pixel, neighbour, 3]   of each filter alone
"""

from typing import no_type_check

import numpy as np

from cbnerf.kernels import compiled, run_all, split_for_threads

_LANES = 12
"""Products that are summed apart, for vector instructions; divides the numbers of a filter."""


def apply_each(image: np.ndarray, indices: np.ndarray, table: np.ndarray, side: int) -> np.ndarray:
    """The corrections `[pixels neighbours 3]` of a padded image."""
    corrections = np.empty((*indices.shape, 3), table.dtype)
    flat = table.reshape(len(table), -1)
    run_all(
        lambda part: _apply(image, indices, flat, side, part.start, part.stop, corrections),
        split_for_threads(len(indices)),
    )
    return corrections


@compiled("contract")
@no_type_check
def _apply(image, indices, table, side, first, last, corrections):
    width, numbers = image.shape[1] - side + 1, table.shape[1]
    inputs, sums = np.empty(numbers, table.dtype), np.empty(_LANES, table.dtype)
    inputs[:] = 1
    for pixel in range(first, last):
        top, left = pixel // width, pixel % width
        at = 0
        for row in range(top, top + side):
            for column in range(left, left + side):
                for channel in range(3):
                    # One factor for each of the three outputs.
                    inputs[at] = inputs[at + 1] = inputs[at + 2] = image[row, column, channel]
                    at += 3
        for rank in range(indices.shape[1]):
            own = table[indices[pixel, rank]]
            sums[:] = 0
            for begin in range(0, numbers, _LANES):
                for lane in range(_LANES):
                    sums[lane] += inputs[begin + lane] * own[begin + lane]
            for channel in range(3):
                total = sums[channel]
                for lane in range(channel + 3, _LANES, 3):
                    total += sums[lane]
                corrections[pixel, rank, channel] = total

"""Nearest codes on a CPU, compiled by numba: an exact search that skips most codes.

Codes are halved, again and again, along each of the first dimensions in turn, as in a k-d tree
(Bentley, 1975). A leaf of codes is skipped if its box, or its codes in the dimensions
looked at so far, lie farther from a latent than the nearest codes found. This pays where few
dimensions hold most of the variance.

Arrays of this file; dimensions are sorted by variance, greatest first:

    order[dim]                  numbers of the dimensions of latents
    leaves[leaf, dim, place]    codes; places without a code are far away
    numbers[leaf, place]        of these codes
    low, high[box, leaf]        box of the codes of a leaf in the first dimensions
"""

from typing import NamedTuple, no_type_check

import numpy as np

from cbnerf.kernels import compiled, run_all, split_for_threads

LEAF = 32
"""Most codes of a leaf; a multiple of the width of vector instructions."""
_BOX = 3
"""Dimensions of the boxes."""
_FAR = 1e15
"""Coordinates of places without a code; their squares are finite."""


class _Leaves(NamedTuple):
    order: np.ndarray
    leaves: np.ndarray
    numbers: np.ndarray
    low: np.ndarray
    high: np.ndarray


def find_several(latents: np.ndarray, codes: np.ndarray, number: int) -> np.ndarray:
    """Numbers of the nearest codes `[rows number]` of float32 latents `[rows dim]`, nearest first;
    there must be as many codes. Those of a latent that is not finite are 0."""
    found = np.zeros((len(latents), number), np.int64)
    leaves = _divide(codes)
    run_all(
        lambda part: _search(latents[part], *leaves, found[part]), split_for_threads(len(latents))
    )
    return found


def _divide(codes: np.ndarray) -> _Leaves:
    order = np.argsort(-codes.var(axis=0), kind="stable")
    columns = np.ascontiguousarray(codes.T[order])
    dim, count = columns.shape
    parts = 2 ** max(int(np.ceil(np.log2(count / LEAF))), 0)
    size = -(-count // parts)
    # Halves are of one size: the last code is repeated, and its copies are then moved away.
    numbers = np.arange(parts * size)[None]
    for level in range(parts.bit_length() - 1):
        along = columns[level % min(_BOX, dim), np.minimum(numbers, count - 1)]
        ranks = np.argpartition(along, along.shape[1] // 2, axis=1)
        numbers = np.take_along_axis(numbers, ranks, axis=1).reshape(2 * len(numbers), -1)
    is_copy, numbers = numbers >= count, np.minimum(numbers, count - 1)
    own = columns[:, numbers]
    leaves = np.full((parts, dim, LEAF), _FAR, codes.dtype)
    leaves[..., :size] = np.where(is_copy, codes.dtype.type(_FAR), own).swapaxes(0, 1)
    return _Leaves(order, leaves, numbers, own[:_BOX].min(axis=2), own[:_BOX].max(axis=2))


@compiled("contract", "reassoc")
@no_type_check
def _search(latents, order, leaves, numbers, low, high, found):
    rows, number = found.shape
    count, dim, places = leaves.shape
    real = leaves.dtype.type
    latent, away = np.empty(dim, leaves.dtype), np.empty(places, leaves.dtype)
    gaps, nearest = np.empty(count, leaves.dtype), np.empty(number, leaves.dtype)
    for row in range(rows):
        for axis in range(dim):
            latent[axis] = latents[row, order[axis]]
        gaps[:] = real(0.0)
        for axis in range(len(low)):
            for leaf in range(count):
                below, above = low[axis, leaf] - latent[axis], latent[axis] - high[axis, leaf]
                gaps[leaf] += max(max(below, above), real(0.0)) ** 2
        nearest[:] = bound = real(np.inf)
        first = gaps.argmin()
        for step in range(count):
            leaf = (first + step) % count  # leaves in turn are near to each other
            if gaps[leaf] >= bound:
                continue
            away[:] = least = real(0.0)
            for begin in range(0, dim, 8):
                for axis in range(begin, min(begin + 8, dim)):
                    for place in range(places):
                        away[place] += (leaves[leaf, axis, place] - latent[axis]) ** 2
                least = away.min()
                if least >= bound:
                    break
            if least >= bound:
                continue
            for place in range(places):
                if away[place] < bound:
                    rank = number - 1
                    while rank > 0 and nearest[rank - 1] > away[place]:
                        nearest[rank] = nearest[rank - 1]
                        found[row, rank] = found[row, rank - 1]
                        rank -= 1
                    nearest[rank] = away[place]
                    found[row, rank] = numbers[leaf, place]
                    bound = nearest[number - 1]

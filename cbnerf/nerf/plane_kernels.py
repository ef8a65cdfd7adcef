"""Feature planes on a CPU, compiled by numba: composition, lookups and total variation.

Arrays of this file: `table`, `[cells channels]`, holds the cells of all planes; `points` lie in
[-1, 1]^3; `layout`, `[planes 5]`, has the height, the width, the first table row and the two axes
of each plane, three planes per cell size; `samples`, `[points planes channels]`, are the
interpolated cells; `features`, `[points channels * cell_sizes]`, their products.

Sums are in a fixed order, also with several threads, since no two threads write to one plane.
"""

from collections.abc import Sequence
from typing import no_type_check

import numpy as np
from numba import njit

from cbnerf.kernels import compiled, run_all, split_for_threads


@njit(inline="always")
@no_type_check
def _find_cell(place, count):
    """The cell before a place in [-1, 1], and the share of the next one; outside, those at the
    border. NaN has a valid cell, too, and NaN as its share."""
    along = (place + 1.0) / 2.0 * (count - 1)
    cell = min(int(along), count - 2) if along > 0.0 else 0
    return cell, min(max(along - cell, 0.0), 1.0)


@njit(inline="always")
@no_type_check
def _find_corner(point, plane, dtype):
    """The first of four table rows, and the shares of all four."""
    column, right = _find_cell(point[plane[3]], plane[1])
    row, down = _find_cell(point[plane[4]], plane[0])
    left, up = 1.0 - right, 1.0 - down
    shares = dtype(up * left), dtype(up * right), dtype(down * left), dtype(down * right)
    return plane[2] + row * plane[1] + column, shares


@compiled("contract")
@no_type_check
def _look_up(table, points, layout, samples, features):
    channels = table.shape[1]
    for number in range(len(points)):
        for index in range(len(layout)):
            corner, (a, b, c, d) = _find_corner(points[number], layout[index], table.dtype.type)
            below = corner + layout[index, 1]
            for channel in range(channels):
                samples[number, index, channel] = (
                    a * table[corner, channel]
                    + b * table[corner + 1, channel]
                    + c * table[below, channel]
                    + d * table[below + 1, channel]
                )
        for size in range(len(layout) // 3):
            for channel in range(channels):
                features[number, size * channels + channel] = (
                    samples[number, 3 * size, channel]
                    * samples[number, 3 * size + 1, channel]
                    * samples[number, 3 * size + 2, channel]
                )


@compiled("contract")
@no_type_check
def _add_gradient(gradient, points, layout, samples, index, total):
    """Add the gradient of plane `index` to its rows of `total`."""
    channels = total.shape[1]
    size = index // 3
    other, another = 3 * size + (index + 1) % 3, 3 * size + (index + 2) % 3
    for number in range(len(points)):
        corner, (a, b, c, d) = _find_corner(points[number], layout[index], total.dtype.type)
        below = corner + layout[index, 1]
        for channel in range(channels):
            slope = (
                gradient[number, size * channels + channel]
                * samples[number, other, channel]
                * samples[number, another, channel]
            )
            total[corner, channel] += a * slope
            total[corner + 1, channel] += b * slope
            total[below, channel] += c * slope
            total[below + 1, channel] += d * slope


@njit(inline="always")
@no_type_check
def _find_coarse(index, count, coarse_count):
    """Of a cell of a finer grid with aligned corners: the coarse cell before it, and the share of
    the next one."""
    along = index * (coarse_count - 1) / (count - 1)
    cell = min(int(along), coarse_count - 2)
    return cell, along - cell


@compiled("contract")
@no_type_check
def _add_enlarged(grid, coarse, out):
    """`out` becomes the sum of `grid` and of a coarser one, enlarged bilinearly."""
    height, width, channels = grid.shape
    row = np.empty(coarse.shape[1:], coarse.dtype)
    for y in range(height):
        above, share = _find_coarse(y, height, coarse.shape[0])
        down, up = coarse.dtype.type(share), coarse.dtype.type(1.0 - share)
        row[:] = up * coarse[above] + down * coarse[above + 1]
        for x in range(width):
            before, share = _find_coarse(x, width, coarse.shape[1])
            right, left = coarse.dtype.type(share), coarse.dtype.type(1.0 - share)
            for channel in range(channels):
                out[y, x, channel] = grid[y, x, channel] + (
                    left * row[before, channel] + right * row[before + 1, channel]
                )


@compiled("contract")
@no_type_check
def _add_reduced(gradient, coarse):
    """Add to `coarse` what the gradient of a finer grid means for it: the adjoint of enlarging."""
    height, width, channels = gradient.shape
    row = np.empty(coarse.shape[1:], coarse.dtype)
    for y in range(height):
        row[:] = 0
        for x in range(width):
            before, share = _find_coarse(x, width, coarse.shape[1])
            right, left = coarse.dtype.type(share), coarse.dtype.type(1.0 - share)
            for channel in range(channels):
                row[before, channel] += left * gradient[y, x, channel]
                row[before + 1, channel] += right * gradient[y, x, channel]
        above, share = _find_coarse(y, height, coarse.shape[0])
        coarse[above] += coarse.dtype.type(1.0 - share) * row
        coarse[above + 1] += coarse.dtype.type(share) * row


def compose(pyramids: Sequence[Sequence[np.ndarray]], planes: Sequence[np.ndarray]) -> None:
    """Write the sums of pyramids, each from fine to coarse, to the planes."""

    def add(index: int) -> None:
        *finer, total = pyramids[index]
        for grid in reversed(finer[1:]):
            enlarged = np.empty_like(grid)
            _add_enlarged(grid, total, enlarged)
            total = enlarged
        if finer:
            _add_enlarged(finer[0], total, planes[index])
        else:
            planes[index][:] = total

    run_all(add, range(len(planes)))


def gradients_of_grids(
    gradients: Sequence[np.ndarray], shapes: Sequence[Sequence[tuple[int, ...]]]
) -> list[np.ndarray]:
    """The gradients of all grids of pyramids from those of the planes; `shapes` are those of the
    grids of each plane, from fine to coarse."""
    found: list[list[np.ndarray]] = [[] for _ in gradients]

    def add(index: int) -> None:
        finer = gradients[index]
        found[index].append(finer)
        for shape in shapes[index][1:]:
            coarse = np.zeros(shape, finer.dtype)
            _add_reduced(finer, coarse)
            found[index].append(coarse)
            finer = coarse

    run_all(add, range(len(gradients)))
    return [gradient for pyramid in found for gradient in pyramid]


@compiled("contract", "reassoc")
@no_type_check
def _total_variation(table, height, width, first, slopes):
    """The term of one plane; its gradient goes to the plane's rows of `slopes`."""
    channels = table.shape[1]
    along = width * channels
    rows = table[first : first + height * width].reshape(height, along)
    slope_rows = slopes[first : first + height * width].reshape(height, along)
    down = table.dtype.type(2.0 / ((height - 1) * along))
    right = table.dtype.type(2.0 / (height * (along - channels)))
    total = 0.0
    for row in range(height):
        here, slope = rows[row], slope_rows[row]
        across = table.dtype.type(0.0)
        for index in range(along - channels):
            across += (here[index + channels] - here[index]) ** 2
        for index in range(channels):
            slope[index] += right * (here[index] - here[index + channels])
            slope[along - 1 - index] += right * (
                here[along - 1 - index] - here[along - 1 - index - channels]
            )
        for index in range(channels, along - channels):
            slope[index] += right * (
                here[index] + here[index] - here[index - channels] - here[index + channels]
            )
        total += right * across
        if row + 1 < height:
            below, slope_below = rows[row + 1], slope_rows[row + 1]
            across = table.dtype.type(0.0)
            for index in range(along):
                step = below[index] - here[index]
                across += step**2
                slope[index] -= down * step
                slope_below[index] += down * step
            total += down * across
    return total / 2


def total_variation(table: np.ndarray, layout: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean squared difference of adjacent cells, summed over planes, and its gradient."""
    slopes, terms = np.zeros_like(table), np.zeros(len(layout))

    def add(index: int) -> None:
        height, width, first = layout[index, :3]
        terms[index] = _total_variation(table, height, width, first, slopes)

    run_all(add, range(len(layout)))
    return float(terms.sum()), slopes


def look_up(table: np.ndarray, points: np.ndarray, layout: np.ndarray) -> tuple[np.ndarray, ...]:
    """`features` and `samples` of all points."""
    channels = table.shape[1]
    samples = np.empty((len(points), len(layout), channels), table.dtype)
    features = np.empty((len(points), len(layout) // 3 * channels), table.dtype)
    run_all(
        lambda part: _look_up(table, points[part], layout, samples[part], features[part]),
        split_for_threads(len(points)),
    )
    return features, samples


def gradient_of_table(
    gradient: np.ndarray, points: np.ndarray, layout: np.ndarray, samples: np.ndarray, rows: int
) -> np.ndarray:
    """The gradient of a table of so many rows from that of the features."""
    total = np.zeros((rows, samples.shape[2]), samples.dtype)
    run_all(
        lambda index: _add_gradient(gradient, points, layout, samples, index, total),
        range(len(layout)),
    )
    return total

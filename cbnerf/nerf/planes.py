"""Feature planes: pyramids of grids that are composed once per step, lookups, total variation.

Names of this file: a *plane* is `[height width channels]`; the *table* holds the cells of all
planes, one per row, in the order (x, y), (x, z), (y, z) per cell size; `sizes` are the planes'
heights and widths.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cbnerf.kernels import has_kernels

_AXES = ((0, 1), (0, 2), (1, 2))

Sizes = tuple[tuple[int, int], ...]


class Planes(NamedTuple):
    """Composed planes."""

    table: Float[Tensor, "cells channels"]
    sizes: Sizes


def split_table(
    table: Float[Tensor, "cells channels"], sizes: Sizes
) -> list[Float[Tensor, "height width channels"]]:
    """The planes, as views of the table."""
    parts = table.split([height * width for height, width in sizes])
    return [part.view(*size, -1) for part, size in zip(parts, sizes, strict=True)]


class FeaturePlanes(nn.Module):
    """Axis-aligned feature planes, three per cell size; a feature is the product over the three
    (K-Planes).

    `cells` are the numbers of cells along x, y and z at scale 1. A plane is a pyramid: the sum of
    `levels` grids, each at half the resolution of the previous one. Coarse structure is learned
    first, and fine cells that few rays hit stay smooth.
    """

    def __init__(
        self, cells: tuple[int, int, int], channels: int, levels: int, scales: tuple[int, ...]
    ):
        super().__init__()
        coarser = [[max(count // scale, 2) for count in cells] for scale in scales]
        self._sizes = tuple((count[b], count[a]) for count in coarser for a, b in _AXES)
        self._levels = levels
        self.grids = nn.ParameterList(
            torch.empty(*_level_size(size, level), channels).uniform_(0.1, 0.9)
            if level == levels - 1
            else torch.zeros(*_level_size(size, level), channels)
            for size in self._sizes
            for level in range(levels)
        )

    def compose(self) -> Planes:
        """The planes at their finest size."""
        if has_kernels(self.grids[0]):
            table = _CompiledComposition.apply(self._sizes, self._levels, *self.grids)
            return Planes(table, self._sizes)
        planes = []
        for first in range(0, len(self.grids), self._levels):
            *finer, plane = self.grids[first : first + self._levels]
            for grid in reversed(finer):
                plane = grid + enlarge(plane, grid.shape[:2])
            planes.append(plane.flatten(0, 1))
        return Planes(torch.cat(planes), self._sizes)


def _level_size(size: tuple[int, int], level: int) -> tuple[int, int]:
    return max(-(-size[0] // 2**level), 2), max(-(-size[1] // 2**level), 2)


def enlarge(
    grid: Float[Tensor, "_ _ channels"], size: tuple[int, ...]
) -> Float[Tensor, "height width channels"]:
    """Bilinear with aligned corners: `F.interpolate` with a deterministic backward."""
    for axis, count in enumerate(size):
        last = grid.shape[axis] - 1
        place = torch.linspace(0, last, count, dtype=grid.dtype, device=grid.device)
        before = place.floor().clamp(max=last - 1)
        share = (place - before).unflatten(0, (-1, *[1] * (grid.ndim - 1 - axis)))
        first = before.int()
        grid = torch.lerp(grid.index_select(axis, first), grid.index_select(axis, first + 1), share)
    return grid


class _CompiledComposition(torch.autograd.Function):
    """`compose` by the kernels for CPUs; `grids` are those of the first plane, fine to coarse,
    etc."""

    @staticmethod
    def forward(ctx, sizes: Sizes, levels: int, *grids: Tensor) -> Tensor:
        from cbnerf.nerf.plane_kernels import compose

        ctx.sizes, ctx.levels, ctx.shapes = sizes, levels, [grid.shape for grid in grids]
        num_cells = sum(height * width for height, width in sizes)
        table = grids[0].new_empty(num_cells, grids[0].shape[-1])
        arrays = [grid.detach().numpy() for grid in grids]
        compose(_pyramids(arrays, levels), [plane.numpy() for plane in split_table(table, sizes)])
        return table

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        from cbnerf.nerf.plane_kernels import gradients_of_grids

        planes = [plane.numpy() for plane in split_table(gradient.contiguous(), ctx.sizes)]
        gradients = gradients_of_grids(planes, _pyramids(ctx.shapes, ctx.levels))
        return None, None, *(torch.from_numpy(array) for array in gradients)


def _pyramids(items: list[Any], levels: int) -> list[list[Any]]:
    """The items of each plane."""
    return [items[first : first + levels] for first in range(0, len(items), levels)]


def interpolate_planes(
    composed: Planes, points: Float[Tensor, "points 3"]
) -> Float[Tensor, "points features"]:
    """Bilinear samples of the planes at points in [-1, 1]^3, multiplied over each three planes.

    `features` is channels times cell sizes. Points get no gradient.
    """
    table, sizes = composed
    if has_kernels(points):
        return _CompiledLookup.apply(table, points, sizes)
    height, width, first, axes = _layout(sizes, points.device)

    x, y = ((points.T[axis] + 1) / 2 for axis in axes.unbind(1))
    x, y = x * (width - 1), y * (height - 1)
    column = x.floor().clamp(min=0).minimum(width - 2)
    row = y.floor().clamp(min=0).minimum(height - 2)
    right, down = (x - column).clamp(0, 1), (y - row).clamp(0, 1)
    left, up = 1 - right, 1 - down
    # As integers: in float32 the numbers of a plane's 2^24th and later cells would be rounded.
    corner = first + row.int() * width + column.int()
    cells = torch.stack([corner, corner + 1, corner + width, corner + width + 1], dim=-1)
    shares = torch.stack([up * left, up * right, down * left, down * right], dim=-1)
    sampled = _WeightedSum.apply(table, cells.flatten(0, 1), shares.flatten(0, 1))
    xy, xz, yz = sampled.view(-1, 3, len(points), table.shape[1]).unbind(1)
    return torch.cat((xy * xz * yz).unbind(0), dim=-1)


# Cached, because copying it to a GPU at every step would block the host.
@lru_cache(maxsize=64)
def _layout(sizes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, ...]:
    """Height, width and first table row of each plane (int32), and its two axes."""
    layout = torch.from_numpy(_table_layout(sizes)).to(device)
    height, width, first = layout[:, :3].int().T[..., None].unbind(0)
    return height, width, first, layout[:, 3:]


_CACHED_ROWS = 16384
"""Sums per chunk of the backward on a CPU; a chunk fits into the cache."""


class _WeightedSum(torch.autograd.Function):
    """Weighted sums of table rows: `embedding_bag` with a deterministic backward.

    `scatter_add_` sorts the rows first and is faster than `index_add_` on CPUs; on GPUs only
    `index_add_` can be deterministic.
    """

    @staticmethod
    def forward(ctx, table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.num_rows = len(table)
        return F.embedding_bag(rows, table, per_sample_weights=weights, mode="sum")

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        rows, weights = ctx.saved_tensors
        total = gradient.new_zeros(ctx.num_rows, gradient.shape[1])
        if gradient.device.type == "cpu":
            parts = (tensor.split(_CACHED_ROWS) for tensor in (rows, weights, gradient))
            for row, weight, part in zip(*parts, strict=True):
                shares = (part[:, None] * weight[..., None]).flatten(0, 1)
                total.scatter_add_(0, row.long().flatten()[:, None].expand_as(shares), shares)
            return total, None, None
        for row, weight in zip(rows.unbind(1), weights.unbind(1), strict=True):
            total.index_add_(0, row, gradient * weight[:, None])
        return total, None, None


class _CompiledLookup(torch.autograd.Function):
    """`interpolate_planes` by the kernels for CPUs, and its gradient for the table."""

    @staticmethod
    def forward(ctx, table: Tensor, points: Tensor, sizes: Sizes) -> Tensor:
        from cbnerf.nerf.plane_kernels import look_up

        points = points.contiguous()
        layout = _table_layout(sizes)
        features, samples = look_up(table.detach().numpy(), points.numpy(), layout)
        ctx.save_for_backward(points, torch.from_numpy(samples))
        ctx.sizes, ctx.num_rows = sizes, len(table)
        return torch.from_numpy(features)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        from cbnerf.nerf.plane_kernels import gradient_of_table

        points, samples = (tensor.numpy() for tensor in ctx.saved_tensors)
        layout, gradient = _table_layout(ctx.sizes), gradient.contiguous()
        total = gradient_of_table(gradient.numpy(), points, layout, samples, ctx.num_rows)
        return torch.from_numpy(total), None, None


@lru_cache(maxsize=64)
def _table_layout(sizes: Sizes) -> np.ndarray:
    """Height, width, first table row and axes of each plane."""
    height, width = np.array(sizes, np.int64).T
    first = (height * width).cumsum() - height * width
    axes = np.array(_AXES * (len(sizes) // 3), np.int64)
    return np.column_stack([height, width, first, axes])


def total_variation(composed: Planes) -> Float[Tensor, ""]:
    """Mean squared difference of adjacent cells, summed over planes (TensoRF)."""
    table, sizes = composed
    if has_kernels(table):
        return _CompiledTotalVariation.apply(table, sizes)
    terms = [
        F.mse_loss(plane[1:], plane[:-1]) + F.mse_loss(plane[:, 1:], plane[:, :-1])
        for plane in split_table(table, sizes)
    ]
    return torch.stack(terms).sum()


class _CompiledTotalVariation(torch.autograd.Function):
    """`total_variation` by the kernels for CPUs."""

    @staticmethod
    def forward(ctx, table: Tensor, sizes: Sizes) -> Tensor:
        from cbnerf.nerf.plane_kernels import total_variation

        total, slopes = total_variation(table.detach().numpy(), _table_layout(sizes))
        ctx.save_for_backward(torch.from_numpy(slopes))
        return table.new_tensor(total)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (slopes,) = ctx.saved_tensors
        return slopes * gradient, None

"""Radiance fields: density and colour of points in NDC, seen from a direction.

Points of the planes lie in [-1, 1]^3: `PlanesModel` divides x and y by the extent that the cameras
see at their depth.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cbnerf.config import MLPConfig, PlanesConfig

_AXES = ((0, 1), (0, 2), (1, 2))


class Planes(NamedTuple):
    """Composed planes in the order (x, y), (x, z), (y, z) per cell size; `table` holds the cells
    of all planes, one per row."""

    planes: list[Float[Tensor, "height width channels"]]
    table: Float[Tensor, "cells channels"]


def join_planes(planes: list[Float[Tensor, "_ _ channels"]]) -> Planes:
    """Concatenate the cells of all planes, so that one lookup serves all."""
    return Planes(planes, torch.cat([plane.reshape(-1, plane.shape[-1]) for plane in planes]))


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
        self._sizes = [(count[b], count[a]) for count in coarser for a, b in _AXES]
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
        planes = []
        for first in range(0, len(self.grids), self._levels):
            pyramid = list(self.grids[first : first + self._levels])
            plane = pyramid.pop()
            for grid in reversed(pyramid):
                plane = grid + enlarge(plane, grid.shape[:2])
            planes.append(plane)
        return join_planes(planes)


def _level_size(size: tuple[int, int], level: int) -> tuple[int, int]:
    return max(-(-size[0] // 2**level), 2), max(-(-size[1] // 2**level), 2)


def enlarge(
    grid: Float[Tensor, "_ _ channels"], size: tuple[int, ...]
) -> Float[Tensor, "height width channels"]:
    """Bilinear with aligned corners: `F.interpolate` with a deterministic backward."""
    for axis, count in enumerate(size):
        last = grid.shape[axis] - 1
        place = torch.linspace(0, last, count, device=grid.device)
        before = place.floor().clamp(max=last - 1)
        share = (place - before).unflatten(0, (-1, *[1] * (grid.ndim - 1 - axis)))
        first = before.int()
        grid = torch.lerp(grid.index_select(axis, first), grid.index_select(axis, first + 1), share)
    return grid


def interpolate_planes(
    composed: Planes, points: Float[Tensor, "points 3"]
) -> Float[Tensor, "points features"]:
    """Bilinear samples of the planes at points in [-1, 1]^3, multiplied over each three planes.

    `features` is channels times cell sizes.
    """
    planes, table = composed
    sizes = tuple((plane.shape[0], plane.shape[1]) for plane in planes)
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
    height, width = torch.tensor(sizes, dtype=torch.int32, device=device).T[..., None].unbind(0)
    first = (height * width).cumsum(0, dtype=torch.int32) - height * width
    return height, width, first, torch.tensor(_AXES * (len(sizes) // 3), device=device)


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


def total_variation(composed: Planes) -> Float[Tensor, ""]:
    """Mean squared difference of adjacent cells, summed over planes (TensoRF)."""
    terms = [
        F.mse_loss(plane[1:], plane[:-1]) + F.mse_loss(plane[:, 1:], plane[:, :-1])
        for plane in composed.planes
    ]
    return torch.stack(terms).sum()


def density_activation(raw: Tensor) -> Tensor:
    """Softplus, shifted and scaled for rays of length 1."""
    return 10 * F.softplus(raw - 1)


class PlanesField(nn.Module):
    """Planes of several cell sizes and two small MLPs (TensoRF, K-Planes)."""

    def __init__(self, config: PlanesConfig, cells: tuple[int, int, int]):
        super().__init__()
        self.planes = FeaturePlanes(cells, config.channels, config.levels, config.scales)
        features = config.channels * len(config.scales)
        self.density_net = nn.Sequential(
            nn.Linear(features, config.hidden), nn.ReLU(), nn.Linear(config.hidden, 16)
        )
        self.color_net = nn.Sequential(
            nn.Linear(15 + 9, config.hidden), nn.ReLU(), nn.Linear(config.hidden, 3)
        )

    def forward(
        self,
        planes: Planes,
        points: Float[Tensor, "points 3"],
        directions: Float[Tensor, "points 3"],
    ) -> tuple[Float[Tensor, "points 3"], Float[Tensor, " points"]]:
        """Colour in [0, 1] and density, from the composed planes."""
        hidden = self.density_net(interpolate_planes(planes, points))
        encoded = torch.cat([hidden[:, 1:], encode(directions, 1)], dim=-1)
        color = self.color_net(encoded)
        return torch.sigmoid(color.float()), density_activation(hidden[:, 0].float())


class ProposalField(nn.Module):
    """Density alone, from one small set of planes; guides the sampler (mip-NeRF 360)."""

    def __init__(self, cells: tuple[int, int, int]):
        super().__init__()
        self.planes = FeaturePlanes(cells, channels=8, levels=2, scales=(1,))
        self.density_net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(
        self, planes: Planes, points: Float[Tensor, "points 3"]
    ) -> Float[Tensor, " points"]:
        raw = self.density_net(interpolate_planes(planes, points))
        return density_activation(raw[:, 0].float())


def encode(x: Float[Tensor, "*points 3"], frequencies: int) -> Float[Tensor, "*points features"]:
    """Positional encoding: x, then sin(2^k x) and cos(2^k x) for each octave k (NeRF, eq. 4).

    `features` is 3 + 6 * frequencies. Without the factor pi, as in the code of NeRF-SR.
    """
    octaves = 2.0 ** torch.arange(frequencies, device=x.device)
    angles = (x[..., None, :] * octaves[:, None]).flatten(-2)
    return torch.cat([x, angles.sin(), angles.cos()], dim=-1)


class MLPField(nn.Module):
    """The network of NeRF: 8 layers of 256 units with a skip connection of the position."""

    def __init__(self, config: MLPConfig):
        super().__init__()
        self._config = config
        position = 3 + 6 * config.position_frequencies
        direction = 3 + 6 * config.direction_frequencies
        self._skip = config.depth // 2
        widths = [position] + [config.width] * (config.depth - 1)
        widths[self._skip] += position
        self.layers = nn.ModuleList(nn.Linear(width, config.width) for width in widths)
        self.density_head = nn.Linear(config.width, 1)
        self.feature = nn.Linear(config.width, config.width)
        self.direction_layer = nn.Linear(config.width + direction, config.width // 2)
        self.rgb_head = nn.Linear(config.width // 2, 3)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(
        self, points: Float[Tensor, "points 3"], directions: Float[Tensor, "points 3"]
    ) -> tuple[Float[Tensor, "points 3"], Float[Tensor, " points"]]:
        """Colour in [0, 1] and raw density, before noise and ReLU."""
        position = encode(points, self._config.position_frequencies)
        hidden = position
        for number, layer in enumerate(self.layers):
            if number == self._skip:
                hidden = torch.cat([position, hidden], dim=-1)
            hidden = F.relu(layer(hidden))
        direction = encode(directions, self._config.direction_frequencies)
        color = torch.cat([self.feature(hidden), direction], dim=-1)
        color = F.relu(self.direction_layer(color))
        color = torch.sigmoid(self.rgb_head(color).float())
        return color, self.density_head(hidden)[:, 0].float()

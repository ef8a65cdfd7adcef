"""The shapes of a built-in world: first hits of rays, texture coordinates and normals.

A shape is canonical: it fills [-1, 1] on each axis. `raycasting.place` scales, rotates and moves
it. Vectors have their components first, `[3 ...]`.

- `intersect(origin, directions)` gives the distance of the first hit, in lengths of the direction;
  infinite where there is none.
- `parametrize(points, size)` gives texture coordinates in world lengths, for a shape of half
  lengths `size`, and normals of any length in canonical space.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Vector = Float[Tensor, "3"]
Rays = Float[Tensor, "3 *rays"]
Distances = Float[Tensor, "*rays"]
Points = Float[Tensor, "3 points"]
Coordinates = Float[Tensor, "2 points"]

_STEPS = 24
"""Steps of the march along a ray through a `Relief`."""


@dataclass(frozen=True)
class Card:
    """The rectangle z = 0, or the part of it where `cut` (of x and y) is true."""

    cut: Callable[[Tensor, Tensor], Tensor] | None = None

    def intersect(self, origin: Vector, directions: Rays) -> Distances:
        t = -origin[2] / directions[2]
        x, y = origin[0] + t * directions[0], origin[1] + t * directions[1]
        hit = (t > 0) & (x.abs() <= 1) & (y.abs() <= 1)
        if self.cut is not None:
            hit &= self.cut(x, y)
        return _keep(hit, t)

    def parametrize(self, points: Points, size: Vector) -> tuple[Coordinates, Points]:
        normals = torch.zeros_like(points)
        normals[2] = 1
        return points[:2] * size[:2, None], normals


@dataclass(frozen=True)
class Box:
    """The cube."""

    def intersect(self, origin: Vector, directions: Rays) -> Distances:
        enter, leave = _slabs(origin, directions)
        return _keep((enter < leave) & (enter > 0), enter)

    def parametrize(self, points: Points, size: Vector) -> tuple[Coordinates, Points]:
        axis = points.abs().argmax(0)
        normals = torch.nn.functional.one_hot(axis, 3).T * points.sign()
        x, y, z = points * size[:, None]
        return torch.stack([torch.where(axis == 0, z, x), torch.where(axis == 1, z, y)]), normals


@dataclass(frozen=True)
class Ball:
    """The unit sphere; an ellipsoid once scaled. Its poles lie on y."""

    def intersect(self, origin: Vector, directions: Rays) -> Distances:
        t, _ = _solve(
            (directions**2).sum(0), torch.tensordot(origin, directions, 1), origin @ origin - 1
        )
        return _keep(t > 0, t)

    def parametrize(self, points: Points, size: Vector) -> tuple[Coordinates, Points]:
        longitude = torch.atan2(points[0], points[2])
        latitude = torch.asin(points[1].clamp(-1, 1))
        return torch.stack([longitude * size[0], latitude * size[1]]), points


@dataclass(frozen=True)
class Tube:
    """The cylinder around y, open at both ends."""

    def intersect(self, origin: Vector, directions: Rays) -> Distances:
        (ox, oy, oz), (dx, dy, dz) = origin, directions
        outer, inner = _solve(dx * dx + dz * dz, ox * dx + oz * dz, ox * ox + oz * oz - 1)
        on_outer = (outer > 0) & ((oy + outer * dy).abs() <= 1)
        on_inner = (inner > 0) & ((oy + inner * dy).abs() <= 1)
        return torch.where(on_outer, outer, _keep(on_inner, inner))

    def parametrize(self, points: Points, size: Vector) -> tuple[Coordinates, Points]:
        x, y, z = points
        angle = torch.atan2(x, z)
        return torch.stack([angle * size[0], y * size[1]]), torch.stack([x, torch.zeros_like(y), z])


@dataclass(frozen=True)
class Relief:
    """The height field z = height(x, y), found by marching: heights must vary gently."""

    height: Callable[[Tensor, Tensor], Tensor]

    def intersect(self, origin: Vector, directions: Rays) -> Distances:
        (ox, oy, oz), (dx, dy, dz) = origin, directions
        enter, leave = _slabs(origin, directions)
        enter = enter.clamp(min=0)
        stride = (leave - enter) / _STEPS
        found = torch.full_like(enter, math.inf)
        below = torch.full_like(enter, math.nan)
        # From far to near: the last crossing found is the first on the ray.
        for step in range(_STEPS, -1, -1):
            t = enter + step * stride
            gap = oz + t * dz - self.height(ox + t * dx, oy + t * dy)
            crossed = (gap > 0) & (below <= 0) & (stride > 0)
            found = torch.where(crossed, t + stride * gap / (gap - below), found)
            below = gap
        return found

    def parametrize(self, points: Points, size: Vector) -> tuple[Coordinates, Points]:
        x, y, _ = points
        step = 1e-2
        slope_x = (self.height(x + step, y) - self.height(x - step, y)) / (2 * step)
        slope_y = (self.height(x, y + step) - self.height(x, y - step)) / (2 * step)
        return points[:2] * size[:2, None], torch.stack([-slope_x, -slope_y, torch.ones_like(x)])


Shape = Card | Box | Ball | Tube | Relief


def _keep(hit: Bool[Tensor, "*rays"], t: Distances) -> Distances:
    return t.masked_fill_(~hit, math.inf)


def _slabs(origin: Vector, directions: Rays) -> tuple[Distances, Distances]:
    """Where rays enter and leave the cube."""
    inverse = 1 / directions
    shape = (3,) + (1,) * (directions.dim() - 1)
    first, second = (-1 - origin).view(shape) * inverse, (1 - origin).view(shape) * inverse
    return torch.minimum(first, second).amax(0), torch.maximum(first, second).amin(0)


def _solve(a: Distances, half_b: Distances, c: Float[Tensor, ""]) -> tuple[Distances, Distances]:
    """Both roots of a t^2 + 2 half_b t + c, the smaller first; NaN where there are none."""
    inside = half_b * half_b - a * c
    # Roots of negative numbers are slow on a CPU.
    root = inside.clamp(min=0).sqrt().masked_fill_(inside < 0, math.nan)
    return (-half_b - root) / a, (-half_b + root) / a

"""Cast rays at textured solids: images and depth of a small world, with the shadows of one lamp.

Vectors have their components first, `[3 ...]`. Cameras have OpenGL's axes; a ray's direction has
length 1 along the optical axis, so that the distance `t` of a hit is its depth.
"""

import math
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cbnerf.scenes.shapes import Shape
from cbnerf.scenes.textures import Number, Texture

Triple = tuple[Number, Number, Number]

_RAYS_PER_BAND = 1 << 17
_AMBIENT, _SKY, _LAMP = 0.24, 0.24, 0.80
_SHADOW_BIAS = 0.03


@dataclass(frozen=True)
class Solid:
    """A shape with its position and texture."""

    shape: Shape
    texture: Texture
    center: Float[Tensor, "3"]
    size: Float[Tensor, "3"]
    """Half lengths."""
    rotation: Float[Tensor, "3 3"]
    gloss: Number
    """Strength of the highlight; 0 is Lambertian."""


def place(
    shape: Shape,
    texture: Texture,
    center: Triple,
    size: Triple,
    turn: Triple = (0, 0, 0),
    gloss: Number = 0,
) -> Solid:
    """A solid at `center` with half lengths `size`, turned by degrees about y, then x, then z."""
    rotation = turn_about(1, turn[0]) @ turn_about(0, turn[1]) @ turn_about(2, turn[2])
    return Solid(shape, texture, torch.tensor(center).float(), torch.tensor(size).float(),
                 rotation, gloss)  # fmt: skip


def turn_about(axis: int, degrees: Number) -> Float[Tensor, "3 3"]:
    """Rotation about a coordinate axis."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    rotation = torch.eye(3)
    after, last = (axis + 1) % 3, (axis + 2) % 3
    rotation[after, after] = rotation[last, last] = cos
    rotation[after, last], rotation[last, after] = -sin, sin
    return rotation


class Camera(NamedTuple):
    pose: Float[Tensor, "3 4"]
    """Camera to world."""
    focal: float
    width: int
    height: int

    def refine(self, factor: int) -> "Camera":
        """The same view with more pixels."""
        return Camera(self.pose, self.focal * factor, self.width * factor, self.height * factor)

    def project(self, points: Float[Tensor, "3 points"]) -> Float[Tensor, "3 points"]:
        """Column, row and depth of points of the world."""
        x, y, z = self.pose[:, :3].T @ (points - self.pose[:, 3:])
        return torch.stack([self.width / 2 - self.focal * x / z,
                            self.height / 2 + self.focal * y / z, -z])  # fmt: skip

    def slopes(self) -> tuple[Float[Tensor, " width"], Float[Tensor, " height"]]:
        """Rays' x and y per unit of depth: one for each column, one for each row."""
        x = (torch.arange(self.width) + 0.5 - self.width / 2) / self.focal
        y = (self.height / 2 - torch.arange(self.height) - 0.5) / self.focal
        return x, y


class World(NamedTuple):
    solids: list[Solid]
    lamp: Camera
    """A point lamp as a camera: points that it sees are lit."""
    lamp_depth: Float[Tensor, "height width"]


class View(NamedTuple):
    rgb: Float[Tensor, "height width 3"]
    depth: Float[Tensor, "height width"]
    """Mean over the pixel, along the optical axis."""
    bounds: tuple[float, float]
    """Nearest and farthest depth of any ray."""


def light(solids: list[Solid], lamp: Camera) -> World:
    """Solids with the shadows of a lamp."""
    depth = torch.cat([_cast(solids, lamp, rows)[0] for rows in _bands(lamp, 1)])
    return World(solids, lamp, depth)


def render(world: World, camera: Camera, supersampling: int) -> View:
    """The image and depth of a camera: each pixel is the mean of `supersampling`^2 rays."""
    fine = camera.refine(supersampling)
    colors, depths, bounds = [], [], []
    for rows in _bands(fine, supersampling):
        depth, index = _cast(world.solids, fine, rows)
        color = _shade(world, fine, rows, depth, index)
        colors.append(torch.nn.functional.avg_pool2d(color, supersampling))
        depths.append(torch.nn.functional.avg_pool2d(depth[None], supersampling)[0])
        bounds.append(torch.stack(depth.aminmax()))
    return View(
        rgb=torch.cat(colors, 1).permute(1, 2, 0),
        depth=torch.cat(depths),
        bounds=(float(torch.stack(bounds)[:, 0].min()), float(torch.stack(bounds)[:, 1].max())),
    )


def _bands(camera: Camera, multiple: int) -> list[slice]:
    rows = max(1, _RAYS_PER_BAND // camera.width // multiple) * multiple
    return [slice(top, min(top + rows, camera.height)) for top in range(0, camera.height, rows)]


def _cast(solids: list[Solid], camera: Camera, rows: slice) -> tuple[Tensor, Tensor]:
    """Depth of the first hit and index of the solid for a band of rows."""
    depth = torch.full((rows.stop - rows.start, camera.width), math.inf)
    index = torch.full_like(depth, -1, dtype=torch.int16)
    for number, solid in enumerate(solids):
        window = _find_window(solid, camera, rows)
        if window is None:
            continue
        origin, x, y = _to_local(solid, camera, rows)
        directions = x[:, None, window[1]] + y[:, window[0], None]
        t = solid.shape.intersect(origin, directions)
        closer = t < depth[window]
        depth[window] = torch.where(closer, t, depth[window])
        index[window].masked_fill_(closer, number)
    return depth, index


def _find_window(solid: Solid, camera: Camera, rows: slice) -> tuple[slice, slice] | None:
    """Rows (of the band) and columns that the solid can cover."""
    corners = torch.tensor(list(product((-1.0, 1.0), repeat=3))).T * solid.size[:, None]
    columns, lines, depths = camera.project(solid.rotation @ corners + solid.center[:, None])
    if depths.max() <= 0:
        return None
    if depths.min() <= 1e-3:
        return slice(0, rows.stop - rows.start), slice(0, camera.width)
    top = max(int(lines.min().floor()), rows.start) - rows.start
    bottom = min(int(lines.max().ceil()) + 1, rows.stop) - rows.start
    left, right = max(int(columns.min().floor()), 0), int(columns.max().ceil()) + 1
    right = min(right, camera.width)
    return (slice(top, bottom), slice(left, right)) if top < bottom and left < right else None


def _to_local(solid: Solid, camera: Camera, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """The camera in canonical space: its origin, and directions as a sum over columns and rows."""
    to_local = solid.rotation.T / solid.size[:, None]
    right, up, back = (to_local @ camera.pose[:, :3]).T
    x, y = camera.slopes()
    origin = to_local @ (camera.pose[:, 3] - solid.center)
    return origin, right[:, None] * x, up[:, None] * y[rows] - back[:, None]


def _shade(world: World, camera: Camera, rows: slice, depth: Tensor, index: Tensor) -> Tensor:
    color = torch.zeros(3, *depth.shape)
    for number, solid in enumerate(world.solids):
        window = _find_window(solid, camera, rows)
        if window is None:
            continue
        row, column = (index[window] == number).nonzero(as_tuple=True)
        if len(row) == 0:
            continue
        row, column = row + window[0].start, column + window[1].start
        origin, x, y = _to_local(solid, camera, rows)
        local = origin[:, None] + depth[row, column] * (x[:, column] + y[:, row])
        color[:, row, column] = _illuminate(world, solid, local, camera.pose[:, 3])
    return color


def _illuminate(
    world: World, solid: Solid, local: Float[Tensor, "3 points"], eye: Float[Tensor, "3"]
) -> Float[Tensor, "3 points"]:
    uv, normals = solid.shape.parametrize(local, solid.size)
    points = solid.rotation @ (local * solid.size[:, None]) + solid.center[:, None]
    normals = _normalize(solid.rotation @ (normals / solid.size[:, None]))
    to_eye = _normalize(eye[:, None] - points)
    to_lamp = _normalize(world.lamp.pose[:, 3:] - points)
    facing = (normals * to_eye).sum(0).sign()
    normals = normals * facing
    lit = _find_lit(world, points)
    sky = _AMBIENT + _SKY * (0.5 + 0.5 * normals[1])
    color = solid.texture(*uv) * (sky + _LAMP * lit * (normals * to_lamp).sum(0).clamp(min=0))
    if solid.gloss:
        halfway = (normals * _normalize(to_eye + to_lamp)).sum(0).clamp(min=0)
        color = color + solid.gloss * lit * halfway**40
    return color.clamp(0, 1)


def _find_lit(world: World, points: Float[Tensor, "3 points"]) -> Float[Tensor, " points"]:
    """Share of the lamp that points see, interpolated between the four nearest lamp rays."""
    column, row, depth = world.lamp.project(points)
    column, row = column - 0.5, row - 0.5
    left, top = column.floor(), row.floor()
    lit = torch.zeros_like(depth)
    flat, (height, width) = world.lamp_depth.flatten(), world.lamp_depth.shape
    for down, across in product((0, 1), repeat=2):
        j = (left + across).long().clamp(0, width - 1)
        i = (top + down).long().clamp(0, height - 1)
        weight = (1 - (column - left - across).abs()) * (1 - (row - top - down).abs())
        lit += weight * (depth < flat[i * width + j] + _SHADOW_BIAS)
    return lit


def _normalize(vectors: Float[Tensor, "3 points"]) -> Float[Tensor, "3 points"]:
    return vectors * (vectors * vectors).sum(0).clamp(min=1e-12).rsqrt()

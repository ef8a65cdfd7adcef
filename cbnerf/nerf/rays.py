"""Rays of pixels, in world coordinates and in normalised device coordinates (NDC).

Conventions: camera axes are OpenGL's (right, up, backward); the centre of the pixel in column i and
row j is at (u, v) = (i + 0.5, j + 0.5). Intrinsics are (fx, fy, cx, cy): focal lengths along u and
v, and the principal point (u, v). World lengths are normalised scene units. NDC maps the frustum
beyond the plane z = -1 of the average camera to the cube [-1, 1]^3 (NeRF, appendix C): a ray starts
on that near plane at t = 0 and reaches infinity at t = 1; the depth at t is 1 / (1 - t).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Rays(NamedTuple):
    """Points `origins + t * directions` with t in [0, 1]; directions are not unit vectors."""

    origins: Float[Tensor, "*rays 3"]
    directions: Float[Tensor, "*rays 3"]


class Cameras(NamedTuple):
    """Pinhole cameras of one scene, in high-res pixels."""

    camera_to_world: Float[Tensor, "views 3 4"]
    intrinsics: Float[Tensor, "views 4"]
    size: tuple[int, int]
    """Height and width."""
    frustum: tuple[float, float, float, float]
    """Of NDC: (scale_x, scale_y, shift_x, shift_y). The average camera sees the direction
    (x, y, -1) at `scale_x * x + shift_x`, `scale_y * y + shift_y`."""

    def to(self, device: torch.device | str) -> "Cameras":
        """The same cameras on a device."""
        return self._replace(
            camera_to_world=self.camera_to_world.to(device), intrinsics=self.intrinsics.to(device)
        )


def make_cameras(
    camera_to_world: Float[Tensor, "views 3 4"],
    intrinsics: Float[Tensor, "views 4"],
    size: tuple[int, int],
) -> Cameras:
    """Cameras with the NDC of the frustum that their median intrinsics see."""
    height, width = size
    middle = (len(intrinsics) - 1) // 2
    fx, fy, cx, cy = intrinsics.sort(dim=0).values[middle].tolist()  # the median
    frustum = (2 * fx / width, 2 * fy / height, 2 * cx / width - 1, 1 - 2 * cy / height)
    return Cameras(camera_to_world, intrinsics.float(), size, frustum)


def make_rays(
    cameras: Cameras,
    views: Int[Tensor, "*rays"],
    u: Float[Tensor, "*rays"],
    v: Float[Tensor, "*rays"],
) -> Rays:
    """NDC rays through image points (u, v) given in high-res pixels."""
    return to_ndc(make_world_rays(cameras, views, u, v), cameras)


def make_world_rays(
    cameras: Cameras,
    views: Int[Tensor, "*rays"],
    u: Float[Tensor, "*rays"],
    v: Float[Tensor, "*rays"],
) -> Rays:
    """World rays through image points (u, v): from the camera centre, one unit of depth per t."""
    fx, fy, cx, cy = cameras.intrinsics[views].unbind(-1)
    x, y = (u - cx) / fx, (cy - v) / fy
    in_camera = torch.stack([x, y, -torch.ones_like(x)], dim=-1)
    poses = cameras.camera_to_world[views]
    directions = (poses[..., :3] @ in_camera[..., None])[..., 0]
    return Rays(poses[..., 3], directions)


def to_ndc(rays: Rays, cameras: Cameras) -> Rays:
    """NDC rays of world rays, with the near plane at depth 1 (NeRF, appendix C)."""
    scale_x, scale_y, shift_x, shift_y = cameras.frustum
    origins, directions = rays
    to_near = -(1 + origins[..., 2]) / directions[..., 2]
    x, y, z = (origins + to_near[..., None] * directions).unbind(-1)
    dx, dy, dz = directions.unbind(-1)
    ndc_origins = torch.stack(
        [-scale_x * x / z + shift_x, -scale_y * y / z + shift_y, 1 + 2 / z], dim=-1
    )
    ndc_directions = torch.stack(
        [-scale_x * (dx / dz - x / z), -scale_y * (dy / dz - y / z), -2 / z], dim=-1
    )
    return Rays(ndc_origins, ndc_directions)


def project(
    points: Float[Tensor, "*points 3"], cameras: Cameras, view: int
) -> Float[Tensor, "*points 2"]:
    """Image points (u, v), in high-res pixels, of world points in front of the camera `view`."""
    pose = cameras.camera_to_world[view]
    right, up, backward = ((points - pose[:, 3]) @ pose[:, :3]).unbind(-1)
    fx, fy, cx, cy = cameras.intrinsics[view]
    depth = (-backward).clamp(min=1e-6)
    return torch.stack([cx + fx / depth * right, cy - fy / depth * up], dim=-1)


def make_sub_pixel_rays(
    cameras: Cameras,
    views: Int[Tensor, " pixels"],
    rows: Int[Tensor, " pixels"],
    columns: Int[Tensor, " pixels"],
    scale: int,
    chosen: Int[Tensor, "pixels sub_rays"],
) -> Rays:
    """NDC rays through some of the scale x scale sub-pixels of each low-res pixel.

    `rows` and `columns` are low-res; `chosen` numbers the sub-pixels of a pixel row by row, from 0
    to scale^2 - 1. (NeRF-SR, section 4.1: super-sampling.)
    """
    u = columns[:, None] * scale + chosen % scale + 0.5
    v = rows[:, None] * scale + chosen // scale + 0.5
    return make_rays(cameras, views[:, None].expand_as(chosen), u, v)


def ndc_extent(cameras: Cameras) -> Float[Tensor, "2 2"]:
    """Largest |x| and |y| of all rays, in NDC, at the near plane (row 0) and at infinity (row 1).

    Rays are straight lines in NDC, so the image corners suffice.
    """
    height, width = cameras.size
    num_views = cameras.camera_to_world.shape[0]
    device = cameras.camera_to_world.device
    corners = torch.tensor(
        [[0.0, 0.0], [width, 0.0], [0.0, height], [width, height]], device=device
    )
    views = torch.arange(num_views, device=device)[:, None].expand(-1, 4)
    u, v = corners.T[:, None].expand(-1, num_views, -1)
    rays = make_rays(cameras, views, u, v)
    ends = torch.stack([rays.origins, rays.origins + rays.directions])
    return ends[..., :2].abs().amax(dim=(1, 2))

"""From pixels to rays, in normalised device coordinates (NDC).

Camera axes are OpenGL's (right, up, backwards); pixel (u, v) has its centre at (u + 0.5, v + 0.5).
NDC maps the frustum behind the plane z = -1 of the average camera to the cube [-1, 1]^3 (NeRF,
appendix C): a ray starts on the near plane at t = 0 and ends at infinity at t = 1, and the metric
depth of t is 1 / (1 - t).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Rays(NamedTuple):
    """Points are `origins + t * directions` with t in [0, 1]; directions are not normalised."""

    origins: Float[Tensor, "*rays 3"]
    directions: Float[Tensor, "*rays 3"]


class Cameras(NamedTuple):
    """Pinhole cameras of one scene with common intrinsics, in high-res pixels."""

    camera_to_world: Float[Tensor, "views 3 4"]
    focal: float
    center: tuple[float, float]
    size: tuple[int, int]
    """Height and width."""


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
    """The same rays in world coordinates: from the camera, one unit of depth per unit of t."""
    x = (u - cameras.center[0]) / cameras.focal
    y = (cameras.center[1] - v) / cameras.focal
    in_camera = torch.stack([x, y, -torch.ones_like(x)], dim=-1)
    poses = cameras.camera_to_world[views]
    directions = (poses[..., :3] @ in_camera[..., None])[..., 0]
    return Rays(poses[..., 3], directions)


def to_ndc(rays: Rays, cameras: Cameras) -> Rays:
    """World rays to NDC rays (NeRF, appendix C) with the near plane at depth 1."""
    height, width = cameras.size
    scale_x, scale_y = 2 * cameras.focal / width, 2 * cameras.focal / height
    origins, directions = rays
    to_near = -(1 + origins[..., 2]) / directions[..., 2]
    x, y, z = (origins + to_near[..., None] * directions).unbind(-1)
    dx, dy, dz = directions.unbind(-1)
    ndc_origins = torch.stack([-scale_x * x / z, -scale_y * y / z, 1 + 2 / z], dim=-1)
    ndc_directions = torch.stack(
        [-scale_x * (dx / dz - x / z), -scale_y * (dy / dz - y / z), -2 / z], dim=-1
    )
    return Rays(ndc_origins, ndc_directions)


def project(
    points: Float[Tensor, "*points 3"], cameras: Cameras, view: int
) -> Float[Tensor, "*points 2"]:
    """Image points (u, v), in high-res pixels, where a view shows world points ahead of it."""
    pose = cameras.camera_to_world[view]
    right, up, backward = ((points - pose[:, 3]) @ pose[:, :3]).unbind(-1)
    slope = cameras.focal / (-backward).clamp(min=1e-6)
    return torch.stack([cameras.center[0] + slope * right, cameras.center[1] - slope * up], dim=-1)


def make_sub_pixel_rays(
    cameras: Cameras,
    views: Int[Tensor, " pixels"],
    rows: Int[Tensor, " pixels"],
    columns: Int[Tensor, " pixels"],
    scale: int,
    chosen: Int[Tensor, "pixels sub_rays"],
) -> Rays:
    """Rays through some of the scale x scale high-res pixels that make up each low-res pixel.

    `chosen` numbers them row by row. (NeRF-SR, section 4.1: super-sampling.)
    """
    u = columns[:, None] * scale + chosen % scale + 0.5
    v = rows[:, None] * scale + chosen // scale + 0.5
    return make_rays(cameras, views[:, None].expand_as(chosen), u, v)


def ndc_extent(cameras: Cameras) -> Float[Tensor, "2 2"]:
    """Largest |x| and |y| that any ray reaches at the near plane (row 0) and at infinity (row 1).

    Rays are straight in NDC, so the corners of the images tell.
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

"""Correspondences between views from rendered depth, and the warping error of a video.

Depth is the NDC distance t of `rendering.py`: the point lies on the world plane z = -1 / (1 - t),
for every camera.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cbnerf.nerf.rays import Cameras, make_world_rays, project

# Largest difference of t between two views of one point: 1/50 of the near plane's disparity, above
# the noise of rendered depth and below most depth edges.
_SAME_DEPTH = 0.02
# Points at infinity are moved to 10^4 near-plane distances.
_FARTHEST = 1 - 1e-4


class WarpingError(NamedTuple):
    error: float
    """Mean absolute difference of colours in [0, 1]; nan if no pixel is seen twice."""
    seen: float
    """Fraction of pixels that are visible in the next frame as well."""


def find_points(
    cameras: Cameras, depth: Float[Tensor, "height width"], view: int
) -> Float[Tensor, "height width 3"]:
    """World points of the pixels of a view, from its rendered depth."""
    height, width = depth.shape
    device = depth.device
    v, u = torch.meshgrid(
        torch.arange(height, device=device) + 0.5, torch.arange(width, device=device) + 0.5,
        indexing="ij",
    )  # fmt: skip
    rays = make_world_rays(cameras, torch.full_like(u, view, dtype=torch.int64), u, v)
    z = -1 / (1 - depth.clamp(max=_FARTHEST))
    along = (z - rays.origins[..., 2]) / rays.directions[..., 2]
    return rays.origins + along[..., None] * rays.directions


def find_positions(
    cameras: Cameras, depth: Float[Tensor, "height width"], view: int
) -> Float[Tensor, "height width 3"]:
    """NDC x and y, and the distance t, of the points that the pixels of a view show."""
    x, y, z = find_points(cameras, depth, view).unbind(-1)
    scale_x, scale_y, shift_x, shift_y = cameras.frustum
    return torch.stack([-scale_x * x / z + shift_x, -scale_y * y / z + shift_y, depth], dim=-1)


def follow_pixels(
    cameras: Cameras, depth: Float[Tensor, "height width"], view: int, other: int
) -> Float[Tensor, "height width 2"]:
    """Image points (u, v) in view `other` of the pixels of `view`; NaN where behind its camera."""
    points = find_points(cameras, depth, view)
    pose = cameras.camera_to_world[other]
    ahead = (points - pose[:, 3]) @ pose[:, 2:3] < 0
    return torch.where(ahead, project(points, cameras, other), torch.nan)


def sample(
    image: Float[Tensor, "height width channels"], points: Float[Tensor, "*points 2"]
) -> Float[Tensor, "*points channels"]:
    """Bilinear interpolation at image points (u, v); the border is extended outside the image."""
    height, width, channels = image.shape
    grid = 2 * points / points.new_tensor([width, height]) - 1
    flat = grid.reshape(1, 1, -1, 2)
    stack = image.movedim(-1, 0)[None]
    sampled = F.grid_sample(stack, flat, padding_mode="border", align_corners=False)
    return sampled.view(channels, -1).T.reshape(*points.shape[:-1], channels)


def find_visible(
    points: Float[Tensor, "height width 2"],
    depth: Float[Tensor, "height width"],
    other_depth: Float[Tensor, "height width"],
) -> Bool[Tensor, "height width"]:
    """Pixels whose point lies inside the other image and is not occluded there."""
    height, width = other_depth.shape
    u, v = points.unbind(-1)
    inside = (u >= 0.5) & (u <= width - 0.5) & (v >= 0.5) & (v <= height - 0.5)
    found = sample(other_depth[..., None], points.nan_to_num())[..., 0]
    return inside & ((found - depth).abs() < _SAME_DEPTH)


def warping_error(
    frames: Float[Tensor, "frames height width 3"],
    depth: Float[Tensor, "frames height width"],
    cameras: Cameras,
) -> WarpingError:
    """Mean colour change between consecutive frames at points that are visible in both.

    The warping error of Lai et al. (2018), with rendered depth and cameras instead of optical flow.
    """
    total, seen = 0.0, 0
    for now in range(len(frames) - 1):
        points = follow_pixels(cameras, depth[now], now, now + 1)
        visible = find_visible(points, depth[now], depth[now + 1])
        later = sample(frames[now + 1], points[visible])
        total += (later - frames[now][visible]).abs().mean(-1).sum().item()
        seen += int(visible.sum())
    compared = depth[:-1].numel()
    return WarpingError(total / seen if seen else float("nan"), seen / max(compared, 1))

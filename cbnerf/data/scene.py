"""A scene: photographs of one place with their cameras, ready for training.

Camera axes are OpenGL's: x right, y up, z backwards. Pixel (column u, row v) has its centre at
(u + 0.5, v + 0.5). Lengths of a `Capture` are those of its files; lengths of a `Scene` are
normalised so that the nearest content lies at depth 4/3 and the average camera at the origin.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from cbnerf.config import DataConfig

# Nearest content at depth 1 / 0.75, as LLFF and NeRF have it, so that NDC's near plane at depth 1
# cuts nothing off.
_NEAR_FACTOR = 0.75


class Capture(NamedTuple):
    """What a scene folder holds: photographs and raw cameras, sorted by file name."""

    name: str
    images: UInt8[Tensor, "views height width 3"]
    camera_to_world: Float[Tensor, "views 3 4"]
    focal: float
    """In pixels of `images`."""
    bounds: Float[Tensor, "views 2"]
    """Depth of the nearest and farthest content of each view, along its optical axis."""


@dataclass(frozen=True)
class Scene:
    """A capture with normalised cameras and images cropped to multiples of the scale."""

    name: str
    images: UInt8[Tensor, "views height width 3"]
    """High-res photographs."""
    camera_to_world: Float[Tensor, "views 3 4"]
    focal: float
    """In high-res pixels."""
    center: tuple[float, float]
    """Principal point (u, v) in high-res pixels."""
    scale: int
    """High-res over low-res pixels per side."""

    @property
    def num_views(self) -> int:
        return self.images.shape[0]

    @property
    def height(self) -> int:
        return self.images.shape[1]

    @property
    def width(self) -> int:
        return self.images.shape[2]


def make_scene(capture: Capture, data: DataConfig) -> Scene:
    """Normalise the cameras of a capture and crop its images to multiples of the scale."""
    _, height, width, _ = capture.images.shape
    cropped = capture.images[
        :, : height - height % data.scale, : width - width % data.scale
    ].contiguous()
    camera_to_world = recenter(capture.camera_to_world)
    camera_to_world[:, :, 3] *= 1.0 / (_NEAR_FACTOR * float(capture.bounds.min()))
    return Scene(
        name=capture.name,
        images=cropped,
        camera_to_world=camera_to_world,
        focal=capture.focal,
        center=(width / 2, height / 2),
        scale=data.scale,
    )


def recenter(camera_to_world: Float[Tensor, "views 3 4"]) -> Float[Tensor, "views 3 4"]:
    """Express all poses in the frame of their average camera (LLFF)."""
    poses = camera_to_world.double()
    backward = torch.nn.functional.normalize(poses[:, :, 2].mean(0), dim=0)
    right = torch.linalg.cross(poses[:, :, 1].mean(0), backward)
    if right.norm() < 1e-6:  # Cameras turned about their axes by all angles: any "up" will do.
        right = torch.linalg.cross(poses[0, :, 1], backward)
    right = torch.nn.functional.normalize(right, dim=0)
    up = torch.linalg.cross(backward, right)
    rotation = torch.stack([right, up, backward], dim=1)
    origin = poses[:, :, 3].mean(0)
    moved = torch.cat([poses[:, :, :3], poses[:, :, 3:] - origin[:, None]], dim=2)
    return (rotation.T @ moved).float()

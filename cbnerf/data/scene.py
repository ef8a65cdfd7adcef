"""A scene: photographs of one place with their cameras, ready for training.

Camera axes are OpenGL's: x right, y up, z backwards. Pixel (column u, row v) has its centre at
(u + 0.5, v + 0.5). A `Capture` has the units of its files; a `Scene` is normalised so that the
nearest content is at depth 4/3 and the average camera at the origin.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, UInt8
from PIL import Image
from torch import Tensor

from cbnerf import downsampling
from cbnerf.config import DataConfig
from cbnerf.downsampling import Kernel
from cbnerf.nerf.rays import Cameras, make_cameras

# Nearest content at depth 1 / 0.75, as in LLFF and NeRF, so that the near plane of NDC, at depth 1,
# clips nothing.
_NEAR_FACTOR = 0.75


class Capture(NamedTuple):
    """The content of a scene folder: photographs and raw cameras, sorted by file name."""

    name: str
    images: UInt8[Tensor, "views height width 3"]
    camera_to_world: Float[Tensor, "views 3 4"]
    intrinsics: Float64[Tensor, "views 4"]
    """Focal lengths and principal point (fx, fy, cx, cy), in pixels of `images`."""
    bounds: Float[Tensor, "views 2"]
    """Depth of the nearest and farthest content of each view, along its optical axis."""


@dataclass(frozen=True)
class Scene:
    """A capture with normalised cameras and images cropped to multiples of the scale."""

    name: str
    images: UInt8[Tensor, "views height width 3"]
    """High-res photographs."""
    camera_to_world: Float[Tensor, "views 3 4"]
    intrinsics: Float64[Tensor, "views 4"]
    """Focal lengths and principal point (fx, fy, cx, cy), in high-res pixels."""
    scale: int
    """High-res over low-res pixels per side."""
    nears: Float[Tensor, " views"]
    """Depth of the nearest content of each view along its optical axis, as its bounds say."""

    def cameras(self, device: torch.device | str = "cpu") -> Cameras:
        """The cameras of all views."""
        size = self.height, self.width
        return make_cameras(self.camera_to_world, self.intrinsics, size).to(device)

    def low_res(
        self, kernel: Kernel, views: Sequence[int] | slice = slice(None)
    ) -> UInt8[Tensor, "views low_height low_width 3"]:
        """Low-res photographs of some views, or of all."""
        return downsample(self.images[views], self.scale, kernel)

    def scale_below(self, kernel: Kernel) -> "Scene":
        """The scene with its low-res photographs in place of the high-res ones."""
        low_res = self.low_res(kernel)
        height, width = (side - side % self.scale for side in low_res.shape[1:3])
        return replace(
            self,
            images=low_res[:, :height, :width].contiguous(),
            intrinsics=self.intrinsics / self.scale,
        )

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
    scaling = 1.0 / (_NEAR_FACTOR * float(capture.bounds.min()))
    camera_to_world[:, :, 3] *= scaling
    return Scene(
        name=capture.name,
        images=cropped,
        camera_to_world=camera_to_world,
        intrinsics=capture.intrinsics,
        scale=data.scale,
        nears=capture.bounds[:, 0] * scaling,
    )


def downsample(
    images: UInt8[Tensor, "views height width 3"], scale: int, kernel: Kernel
) -> UInt8[Tensor, "views low_height low_width 3"]:
    """Low-res photographs, rounded to 8 bit.

    `box` takes the mean of scale x scale pixels, `lanczos` is Pillow's filter.
    """
    if scale == 1:
        return images
    if kernel == "lanczos":  # as in NeRF-SR's code; Pillow also rounds between rows and columns
        height, width = images.shape[1] // scale, images.shape[2] // scale
        resized = [
            np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
            for image in images.numpy()
        ]
        return torch.from_numpy(np.stack(resized))
    averaged = downsampling.downsample(images.movedim(-1, 1).float(), scale, kernel)
    return averaged.round().to(torch.uint8).movedim(1, -1).contiguous()


def recenter(camera_to_world: Float[Tensor, "views 3 4"]) -> Float[Tensor, "views 3 4"]:
    """Poses in the frame of their average camera, as in LLFF."""
    poses = camera_to_world.double()
    backward = torch.nn.functional.normalize(poses[:, :, 2].mean(0), dim=0)
    right = torch.linalg.cross(poses[:, :, 1].mean(0), backward)
    if right.norm() < 1e-6:  # the average "up" vanishes or points backwards: take that of view 0
        right = torch.linalg.cross(poses[0, :, 1], backward)
    right = torch.nn.functional.normalize(right, dim=0)
    up = torch.linalg.cross(backward, right)
    rotation = torch.stack([right, up, backward], dim=1)
    origin = poses[:, :, 3].mean(0)
    moved = torch.cat([poses[:, :, :3], poses[:, :, 3:] - origin[:, None]], dim=2)
    return (rotation.T @ moved).float()

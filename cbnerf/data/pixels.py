"""Low-res photographs from high-res ones, and batches of their pixels."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from cbnerf import downsampling
from cbnerf.data.scene import Scene
from cbnerf.downsampling import Kernel
from cbnerf.rng import Rng


def downsample(
    images: UInt8[Tensor, "views height width 3"], scale: int, kernel: Kernel
) -> UInt8[Tensor, "views low_height low_width 3"]:
    """Low-res photographs, 8 bit as a camera would save them."""
    if scale == 1:
        return images
    if kernel == "lanczos":  # by Pillow, as in NeRF-SR's code: it rounds and clips on the way, too
        height, width = images.shape[1] // scale, images.shape[2] // scale
        resized = [
            np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
            for image in images.numpy()
        ]
        return torch.from_numpy(np.stack(resized))
    averaged = downsampling.downsample(images.movedim(-1, 1).float(), scale, kernel)
    return averaged.round().to(torch.uint8).movedim(1, -1).contiguous()


def scale_below(scene: Scene, kernel: Kernel) -> Scene:
    """The scene as its low-res photographs show it: they stand for the high-res ones."""
    low_res = downsample(scene.images, scene.scale, kernel)
    height, width = (side - side % scene.scale for side in low_res.shape[1:3])
    return replace(
        scene,
        images=low_res[:, :height, :width].contiguous(),
        focal=scene.focal / scene.scale,
        center=(scene.center[0] / scene.scale, scene.center[1] / scene.scale),
    )


class PixelBatch(NamedTuple):
    """Low-res pixels, one row each."""

    views: Int[Tensor, " pixels"]
    rows: Int[Tensor, " pixels"]
    columns: Int[Tensor, " pixels"]
    rgb: Float[Tensor, "pixels 3"]


class PixelSampler:
    """Draws low-res pixels of some views at random, all of them resident on one device."""

    def __init__(self, scene: Scene, views: list[int], kernel: Kernel, device: torch.device):
        low_res = downsample(scene.images[views], scene.scale, kernel)
        self._views = torch.tensor(views, device=device)
        self._low_res = low_res.to(device)

    def mean(self) -> Float[Tensor, "3"]:
        """The mean colour."""
        return self._low_res.flatten(0, 2).float().mean(0) / 255

    def draw(self, batch_size: int, rng: Rng) -> PixelBatch:
        """Uniform over all pixels of all views."""
        num_views, height, width, _ = self._low_res.shape
        flat = rng.integers(num_views * height * width, batch_size)
        index, pixel = flat // (height * width), flat % (height * width)
        rows, columns = pixel // width, pixel % width
        rgb = self._low_res[index, rows, columns].float() / 255
        return PixelBatch(self._views[index], rows, columns, rgb)

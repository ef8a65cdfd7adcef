"""Batches of low-res pixels."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cbnerf.data.scene import Scene
from cbnerf.downsampling import Kernel
from cbnerf.rng import Rng


class PixelBatch(NamedTuple):
    """Low-res pixels, one row each."""

    views: Int[Tensor, " pixels"]
    rows: Int[Tensor, " pixels"]
    columns: Int[Tensor, " pixels"]
    rgb: Float[Tensor, "pixels 3"]


class PixelSampler:
    """Draws low-res pixels of some views at random; all of them are on one device."""

    def __init__(self, scene: Scene, views: list[int], kernel: Kernel, device: torch.device):
        self._views = torch.tensor(views, device=device)
        self._low_res = scene.low_res(kernel, views).to(device)

    def mean(self) -> Float[Tensor, "3"]:
        """The mean colour."""
        return self._low_res.flatten(0, 2).float().mean(0) / 255

    def draw(self, batch_size: int, rng: Rng) -> PixelBatch:
        """A batch, uniform over all pixels of all views."""
        num_views, height, width, _ = self._low_res.shape
        flat = rng.integers(num_views * height * width, batch_size)
        index, pixel = flat // (height * width), flat % (height * width)
        rows, columns = pixel // width, pixel % width
        rgb = self._low_res[index, rows, columns].float() / 255
        return PixelBatch(self._views[index], rows, columns, rgb)

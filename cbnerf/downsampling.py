"""Downsampling of a high-res photograph to a low-res one: a linear map of pixels, and its adjoint.

Images are `[batch channels height width]`, of any values, with sides that the scale divides.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Kernel = Literal["box", "lanczos"]

REACH: dict[Kernel, int] = {"box": 0, "lanczos": 3}
"""Reach of a kernel beyond its block, in low-res pixels."""


def downsample(
    images: Float[Tensor, "batch channels height width"], scale: int, kernel: Kernel
) -> Float[Tensor, "batch channels low_height low_width"]:
    """Means of blocks of scale x scale pixels, or Pillow's Lanczos filter, neither rounded."""
    if kernel == "box":
        return F.avg_pool2d(images, scale)
    return _shrink_rows(_shrink_rows(images, scale).mT, scale).mT


def spread(
    images: Float[Tensor, "batch channels low_height low_width"], scale: int, kernel: Kernel
) -> Float[Tensor, "batch channels height width"]:
    """The adjoint of `downsample`, times scale^2: each low-res value is distributed over its
    high-res pixels by the same weights. The brightness of a flat image is preserved."""
    if kernel == "box":
        return F.interpolate(images, scale_factor=scale)
    return _spread_rows(_spread_rows(images, scale).mT, scale).mT


# torch's own `interpolate(mode="lanczos")` is newer than the oldest torch that is supported, and
# runs on a CPU only.
def _shrink_rows(images: Tensor, scale: int) -> Tensor:
    weights, margin = _lanczos(scale, images)
    rows = images.reshape(-1, 1, images.shape[-1])
    shrunk = F.conv1d(rows, weights, stride=scale, padding=margin)
    return (shrunk / _totals(rows, weights, scale, margin)).view(*images.shape[:-1], -1)


def _spread_rows(images: Tensor, scale: int) -> Tensor:
    weights, margin = _lanczos(scale, images)
    rows = images.reshape(-1, 1, images.shape[-1])
    large = rows.new_empty(1, 1, scale * rows.shape[-1])
    rows = scale * rows / _totals(large, weights, scale, margin)
    large = F.conv_transpose1d(rows, weights, stride=scale, padding=margin)
    return large.view(*images.shape[:-1], -1)


def _totals(rows: Tensor, weights: Tensor, scale: int, margin: int) -> Tensor:
    """Sums of the weights that lie within an image: fewer at its ends."""
    return F.conv1d(torch.ones_like(rows[:1]), weights, stride=scale, padding=margin)


def _lanczos(scale: int, like: Tensor) -> tuple[Tensor, int]:
    """Weights of the high-res pixels around a low-res one, `[1 1 pixels]`, and how many of them
    lie beyond its block on either side."""
    lobes = REACH["lanczos"]
    margin = -(-(2 * lobes - 1) * scale // 2)
    pixels = torch.arange(-margin, scale + margin, dtype=like.dtype, device=like.device)
    offset = (pixels + (1 - scale) / 2) / scale  # from middle to middle, in low-res pixels
    weights = torch.sinc(offset) * torch.sinc(offset / lobes) * (offset.abs() < lobes)
    return weights[None, None], margin

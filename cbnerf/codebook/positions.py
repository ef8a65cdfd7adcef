"""The position of a pixel in the scene as further coordinates of its latent.

A field errs in the same way wherever it shows the same place, so codes that know the place know the
error: the same 7x7 pixels want other corrections elsewhere.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

COORDINATES = 3


class Positions(nn.Module):
    """Positions, centred and scaled to spread `weight` times as far as the features of latents."""

    mean: Tensor
    scale: Tensor
    """Of each coordinate."""

    def __init__(self, weight: float):
        super().__init__()
        self._weight = weight
        self.register_buffer("mean", torch.zeros(COORDINATES))
        self.register_buffer("scale", torch.full((COORDINATES,), weight))

    @torch.no_grad()
    def start_from(
        self,
        positions: Iterable[Float[Tensor, "1 3 height width"]],
        features: Iterable[Float[Tensor, "1 dim height width"]],
    ) -> None:
        """Set centre and scale by the positions and features of training views."""
        self.mean, deviation = _mean_and_deviation(positions)
        _, spread = _mean_and_deviation(features)
        # A coordinate that does not vary tells nothing, and its noise must not be enlarged.
        self.scale = self._weight * spread.norm() / deviation.clamp(min=1e-3)

    def forward(
        self, positions: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 height width"]:
        return (positions - self.mean[:, None, None]) * self.scale[:, None, None]


def _mean_and_deviation(images: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Of each channel over all pixels."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for image in images:
        pixels = image.double().movedim(1, -1).flatten(0, -2)
        count += len(pixels)
        total, squares = total + pixels.sum(0), squares + pixels.square().sum(0)
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp(min=0).sqrt().float()

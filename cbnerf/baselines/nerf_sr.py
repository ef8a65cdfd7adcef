"""NeRF-SR's refiner: refines a render with the help of patches of a high-res photograph.

One encoder reads the render and every reference; the features of the references are max-pooled.
`data.references` finds the references. Unlike the other refiners it needs a high-res photograph of
the scene at test time.

Batch normalisation, as published, makes training with N processes differ from one process.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cbnerf.codebook.encoders import SRBatch
from cbnerf.codebook.refiner import DEFAULT_TILE, ImageBatch, Refiner
from cbnerf.config import Config

STRIDE = 8
"""Sides of images inside are multiples of this."""


class _Convolution(nn.Sequential):
    def __init__(self, channels_in: int, channels: int, stride: int = 1):
        super().__init__(
            nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )


class _Encoder(nn.Module):
    """Features at full, half, quarter and eighth resolution."""

    def __init__(self, channels: int):
        super().__init__()
        c = channels
        first = nn.Sequential(nn.Conv2d(3, c, 3, padding=1), nn.ReLU())
        self.scales = nn.ModuleList([
            nn.Sequential(first, _Convolution(c, c)),
            nn.Sequential(_Convolution(c, 2 * c, 2), _Convolution(2 * c, 2 * c)),
            nn.Sequential(_Convolution(2 * c, 4 * c, 2), _Convolution(4 * c, 4 * c)),
            _Convolution(4 * c, 4 * c, 2),
        ])  # fmt: skip

    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> list[Tensor]:
        features = []
        for scale in self.scales:
            image = scale(image)
            features.append(image)
        return features


class _Decoder(nn.Module):
    """From an eighth of the resolution up; each scale sees both images' features."""

    def __init__(self, channels: int):
        super().__init__()
        c = channels
        up = nn.Upsample(scale_factor=2)  # nearest
        last = nn.Sequential(_Convolution(c, c), nn.Conv2d(c, 3, 3, padding=1), nn.Tanh())
        self.scales = nn.ModuleList([
            nn.Sequential(_Convolution(3 * c, c), last),
            nn.Sequential(_Convolution(6 * c, 2 * c), _Convolution(2 * c, 2 * c), up,
                          _Convolution(2 * c, c)),
            nn.Sequential(_Convolution(12 * c, 4 * c), _Convolution(4 * c, 4 * c), up,
                          _Convolution(4 * c, 2 * c)),
            nn.Sequential(_Convolution(8 * c, 4 * c), _Convolution(4 * c, 4 * c), up,
                          _Convolution(4 * c, 4 * c)),
        ])  # fmt: skip

    def forward(self, render: list[Tensor], references: list[Tensor]) -> Tensor:
        above: list[Tensor] = []
        for scale, own, other in reversed(list(zip(self.scales, render, references, strict=True))):
            above = [scale(torch.cat([*above, own, other], dim=1))]
        return above[0]


class ReferenceRefiner(Refiner):
    """NeRF-SR, section 4.2: shared encoder, maximum over the references, one decoder."""

    needs_references = True
    autoencoder = None

    def __init__(self, config: Config):
        super().__init__()
        self.encoder = _Encoder(config.refiner.channels)
        self.decoder = _Decoder(config.refiner.channels)

    def forward(
        self,
        sr: Float[Tensor, "batch 3 height width"],
        references: Float[Tensor, "batch references 3 height width"],
    ) -> Float[Tensor, "batch 3 height width"]:
        """The refined images; all in [0, 1], sides are multiples of 8."""
        pooled: list[Tensor] = []
        for reference in references.unbind(1):
            features = self.encoder(reference * 2 - 1)
            pooled = list(map(torch.maximum, pooled, features)) if pooled else features
        return (self.decoder(self.encoder(sr * 2 - 1), pooled) + 1) / 2

    def losses(
        self,
        forward: Callable[..., Any],
        sr: Float[Tensor, "batch 3 size size"],
        high_res: Float[Tensor, "batch 3 size size"],
        references: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """L1 in [-1, 1]."""
        return {"train/loss": 2 * F.l1_loss(forward(sr, references), high_res)}

    @torch.no_grad()
    def refine(
        self, sr: SRBatch, references: Tensor | None = None, *, tile: int = DEFAULT_TILE
    ) -> ImageBatch:
        """Refine whole images of any size with references `[batch references 3 height width]`."""
        if references is None:
            raise ValueError("this refiner (nerf-sr) needs references, see find_references")
        height, width = sr.shape[-2:]
        margin = (0, -width % STRIDE, 0, -height % STRIDE)
        padded = F.pad(sr[:, :3], margin, mode="replicate")
        # Replication pads at most 4 dimensions, so references become a batch of images.
        filled = F.pad(references.flatten(0, 1), margin, mode="replicate")
        refined = self(padded, filled.unflatten(0, references.shape[:2]))
        return refined[..., :height, :width].clamp(0, 1)

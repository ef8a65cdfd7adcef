"""NeRF-SR's refiner: refines a render with the help of patches of a high-res photograph.

One encoder reads the render and every reference; the features of the references are max-pooled.
`data.references` finds the references. Unlike the other refiners it needs a high-res photograph of
the scene at test time.

Batch normalisation, as published, makes training with N processes differ from one process.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

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


class ReferenceRefiner(nn.Module):
    """NeRF-SR, section 4.2: shared encoder, maximum over the references, one decoder."""

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

    @torch.no_grad()
    def refine(
        self,
        sr: Float[Tensor, "batch 3 height width"],
        references: Float[Tensor, "batch references 3 height width"],
    ) -> Float[Tensor, "batch 3 height width"]:
        """Refine whole images of any size with their references."""
        height, width = sr.shape[-2:]
        margin = (0, -width % STRIDE, 0, -height % STRIDE)
        padded = F.pad(sr, margin, mode="replicate")
        # Replication wants images as a batch of their own.
        beside = F.pad(references.flatten(0, 1), margin, mode="replicate")
        refined = self(padded, beside.unflatten(0, references.shape[:2]))
        return refined[..., :height, :width].clamp(0, 1)

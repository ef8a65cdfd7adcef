"""VQ autoencoders: the published one, and a light one that works at a quarter of the resolution.

Both have one code per 4x4 pixels, latents `[batch height/4 width/4 dim]`, and no normalisation
layers. Images are `[batch 3 height width]` with sides divisible by 4, in [-1, 1]. What a decoder
lends to the refiner on its way to the image are its *skips*.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cbnerf.codebook.fsq import build_quantizer
from cbnerf.codebook.imitation import imitation_loss
from cbnerf.codebook.quantizer import vq_loss
from cbnerf.config import CodebookConfig

STRIDE = 4
"""Pixels per code and side."""


class Decoded(NamedTuple):
    image: Float[Tensor, "batch 3 height width"]
    skips: tuple[Float[Tensor, "batch _ _ _"], ...]


class ResidualStack(nn.Module):
    """One residual layer applied twice; the released code repeats the object, not the layer."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.layer = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1, bias=False),
        )

    def forward(
        self, features: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        for _ in range(2):
            # The released code's first ReLU is in-place, so that the identity path carries it too.
            features = features.relu()
            features = features + self.layer(features)
        return features.relu()


class Encoder(nn.Sequential):
    """The published encoder; the main branch of the refiner has one of its own."""

    def __init__(self, dim: int):
        super().__init__(
            nn.Conv2d(3, 64, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 128, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(128, 128, 3, padding=1),
            ResidualStack(128, 32),
            nn.Conv2d(128, dim, 1),
        )


class Decoder(nn.Module):
    """The published decoder; `with_skips` is that of the main branch, which takes skips in."""

    def __init__(self, dim: int, *, with_skips: bool = False):
        super().__init__()
        wide = 2 if with_skips else 1
        self.stage1 = nn.Sequential(nn.ConvTranspose2d(dim, 128, 1), ResidualStack(128, 32))
        self.stage2 = nn.ConvTranspose2d(wide * 128, 128, 3, padding=1)
        self.stage3 = nn.ConvTranspose2d(wide * 128, 64, 4, stride=2, padding=1)
        self.stage4 = nn.ConvTranspose2d(wide * 64, 3, 4, stride=2, padding=1)

    def forward(
        self,
        latents: Float[Tensor, "batch dim rows columns"],
        skips: tuple[Float[Tensor, "batch _ _ _"], ...] = (),
    ) -> Decoded:
        def join(features: Tensor, i: int) -> Tensor:
            return torch.cat([features, skips[i]], dim=1) if skips else features

        first = self.stage1(latents)
        second = self.stage2(join(first, 0))
        third = self.stage3(join(second, 1).relu())
        return Decoded(self.stage4(join(third, 2).relu()), (first, second, third))


class ResidualBlock(nn.Sequential):
    def __init__(self, channels: int):
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(
        self, features: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        return features + super().forward(features)


class LightEncoder(nn.Sequential):
    def __init__(self, dim: int, channels: int):
        super().__init__(
            nn.PixelUnshuffle(STRIDE),
            nn.Conv2d(3 * STRIDE**2, channels, 3, padding=1),
            ResidualBlock(channels),
            nn.ReLU(),
            nn.Conv2d(channels, dim, 1),
        )


class LightDecoder(nn.Module):
    def __init__(self, dim: int, channels: int):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(dim, channels, 1), ResidualBlock(channels), nn.ReLU())
        self.head = nn.Sequential(
            nn.Conv2d(channels, 3 * STRIDE**2, 3, padding=1), nn.PixelShuffle(STRIDE)
        )

    def forward(self, latents: Float[Tensor, "batch dim rows columns"]) -> Decoded:
        features = self.body(latents)
        return Decoded(self.head(features), (features,))


class Lookup(NamedTuple):
    """What the codebook makes of a batch of SR and HR patches."""

    skips: tuple[Float[Tensor, "batch _ _ _"], ...]
    """Decoder features of the codes, for the refiner."""
    reconstruction: Float[Tensor, "batch 3 height width"]
    """The HR patch, decoded from its codes."""
    vq_loss: Float[Tensor, ""]
    imitation_loss: Float[Tensor, ""]
    high_res_indices: Int[Tensor, "batch rows columns"]
    sr_indices: Int[Tensor, "batch rows columns"]


# The patches of a batch whose skips come from SR codes.
_SR_ROWS = {"hr": slice(0, 0), "sr": slice(None), "mixed": slice(1, None, 2)}


class VQAutoencoder(nn.Module):
    """A codebook that learns from HR patches and is searched with SR patches.

    Without `sr_encoder` one encoder serves both, as published, and imitation pulls at it against
    reconstruction; an encoder of its own leaves the codes of the HR patch as they are.
    """

    def __init__(
        self,
        encoder: Encoder | LightEncoder,
        decoder: Decoder | LightDecoder,
        config: CodebookConfig,
        skips: Literal["hr", "sr", "mixed"],
        sr_encoder: Encoder | LightEncoder | None = None,
    ):
        super().__init__()
        self.encoder = encoder
        self.sr_encoder = sr_encoder
        self.quantizer = build_quantizer(config)
        self.decoder = decoder
        self._sr_rows = _SR_ROWS[skips]

    def encode(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch rows columns dim"]:
        return self.encoder(images).movedim(1, -1)

    def encode_sr(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch rows columns dim"]:
        encoder = self.encoder if self.sr_encoder is None else self.sr_encoder
        return encoder(images).movedim(1, -1)

    def decode(self, latents: Float[Tensor, "batch rows columns dim"]) -> Decoded:
        return self.decoder(latents.movedim(-1, 1))

    def forward(
        self,
        sr: Float[Tensor, "batch 3 height width"],
        high_res: Float[Tensor, "batch 3 height width"],
    ) -> Lookup:
        config, batch = self.quantizer.config, len(sr)
        found = self.quantizer(self.encode(high_res))
        sr_latents = self.encode_sr(sr)
        imitated = self.quantizer(sr_latents, learn=False)
        # Only those SR patches are decoded whose skips are wanted.
        decoded = self.decode(torch.cat([found.latents, imitated.latents[self._sr_rows]]))
        return Lookup(
            skips=tuple(self._choose(skip[:batch], skip[batch:]) for skip in decoded.skips),
            reconstruction=decoded.image[:batch],
            vq_loss=vq_loss(found, config),
            imitation_loss=imitation_loss(
                config.imitation, sr_latents, imitated, found, self.quantizer
            ),
            high_res_indices=found.indices,
            sr_indices=imitated.indices,
        )

    def _choose(self, high_res_skip: Tensor, sr_skip: Tensor) -> Tensor:
        skip = high_res_skip.clone()
        skip[self._sr_rows] = sr_skip
        return skip

    def look_up(
        self, sr: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch _ _ _"], ...]:
        """Skips of the codes that SR images find: all there is at inference."""
        return self.decode(self.quantizer(self.encode_sr(sr), learn=False).latents).skips

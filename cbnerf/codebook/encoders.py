"""VQ autoencoders, and the light encoder and decoder with one code per pixel.

Latents are `[batch rows columns dim]`, with a row and column for each code. Images are
`[batch 3 height width]` with sides divisible by 4, in [-1, 1]. *Skips* are features of the decoder
that the refiner's decoder takes as input.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cbnerf.codebook.fsq import build_quantizer
from cbnerf.codebook.imitation import imitation_loss
from cbnerf.codebook.quantizer import Neighbours, find_neighbours, vq_loss
from cbnerf.config import CodebookConfig

STRIDE = 4
"""Sides of images are multiples of this; pixels per code and side of the published encoder."""
LIGHT_SIDE = 7
"""Receptive field of a code of the light autoencoder, in pixels per side."""
_FLAT = 0.1


class Decoded(NamedTuple):
    image: Float[Tensor, "batch 3 height width"]
    skips: tuple[Float[Tensor, "batch _ _ _"], ...]


class Encoder(nn.Module):
    """Images `[batch 3 height width]` to latents `[batch dim rows columns]`."""

    stride: int
    """Pixels per latent and side."""
    imitated: int
    """Stride of the latents of a render that are quantized in training, if their skips are not
    used."""


class Decoder(nn.Module, ABC):
    """Latents `[batch dim rows columns]` to an image and its skips."""

    @abstractmethod
    def forward(self, latents: Tensor) -> Decoded: ...


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


class LightEncoder(Encoder):
    """One latent per pixel: linear features of its 7x7 neighbourhood.

    Initialised with the principal components of photographs and one constant feature. On the unit
    sphere the constant dominates where the contrast is low, so flat regions do not get the codes of
    noise.
    """

    stride = 1
    imitated = 2  # Receptive fields of adjacent latents overlap by six of seven pixels.

    def __init__(self, dim: int):
        super().__init__()
        self.features = nn.Conv2d(3, dim, LIGHT_SIDE, padding=LIGHT_SIDE // 2)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch dim height width"]:
        return self.features(images)

    @torch.no_grad()
    def start_from(
        self, images: Iterable[Float[Tensor, "batch 3 height width"]], *, constant: bool
    ) -> None:
        """Initialise with the principal components of images; with `constant`, the last feature
        is a constant."""
        weight, bias = self.features.weight, self.features.bias
        assert bias is not None
        gram = torch.zeros(weight[0].numel(), weight[0].numel(), dtype=torch.float64)
        gram = gram.to(weight.device)
        for batch in images:
            patches = F.unfold(batch, LIGHT_SIDE).transpose(0, 1).flatten(1)
            gram += patches @ patches.T
        axes = torch.linalg.eigh(gram).eigenvectors.flip(1).T[: len(bias) - constant]
        weight.zero_()
        bias.zero_()
        weight[: len(axes)] = axes.to(weight).view(-1, *weight.shape[1:])
        if constant:
            bias[-1] = _FLAT


class LightDecoder(Decoder):
    def __init__(self, dim: int):
        super().__init__()
        self.image = nn.Conv2d(dim, 3, LIGHT_SIDE, padding=LIGHT_SIDE // 2)

    def forward(self, latents: Float[Tensor, "batch dim height width"]) -> Decoded:
        return Decoded(self.image(latents), (latents,))


class Lookup(NamedTuple):
    """A batch of SR and HR patches, quantized and decoded."""

    skips: tuple[Float[Tensor, "batch _ _ _"], ...]
    """Decoder features, input of the refiner."""
    reconstruction: Float[Tensor, "batch 3 height width"]
    """The HR patch, decoded from its codes."""
    vq_loss: Float[Tensor, ""]
    imitation_loss: Float[Tensor, ""]
    high_res_indices: Int[Tensor, "batch rows columns"]
    sr_indices: Int[Tensor, "batch sr_rows sr_columns"]
    """In training possibly of every `imitated`-th row and column only."""


# The patches of a batch whose skips come from SR codes.
_SR_ROWS = {"hr": slice(0, 0), "sr": slice(None), "mixed": slice(1, None, 2)}


class VQAutoencoder(nn.Module):
    """A codebook that is trained on HR patches and queried with SR patches.

    Without `sr_encoder` both share one encoder, as published, and the imitation loss competes with
    the reconstruction loss. A separate encoder leaves the codes of HR patches unchanged.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        config: CodebookConfig,
        skips: Literal["hr", "sr", "mixed"],
        sr_encoder: Encoder | None = None,
    ):
        super().__init__()
        self.encoder = encoder
        self.sr_encoder = sr_encoder
        self.quantizer = build_quantizer(config)
        self.decoder = decoder
        self._sr_rows = _SR_ROWS[skips]
        self._step = encoder.imitated if skips == "hr" else 1

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
        batch = len(sr)
        found = self.quantizer(self.encode(high_res))
        step = self._step if self.training else 1
        some = (slice(None), slice(None, None, step), slice(None, None, step))
        sr_latents = self.encode_sr(sr)[some]
        imitated = self.quantizer(sr_latents, learn=False)
        wanted = found._replace(latents=found.latents[some], indices=found.indices[some])
        # Decode only the SR patches whose skips are used.
        lent = imitated.latents[self._sr_rows]
        decoded = self.decode(torch.cat([found.latents, lent]) if len(lent) else found.latents)
        return Lookup(
            skips=tuple(self._choose(skip[:batch], skip[batch:]) for skip in decoded.skips),
            reconstruction=decoded.image[:batch],
            vq_loss=vq_loss(found, self.quantizer.config),
            imitation_loss=imitation_loss(
                self.quantizer.config.imitation, sr_latents, imitated, wanted, self.quantizer
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
        """Skips of the nearest codes of SR images: the only input from codes at test time."""
        return self.decode(self.quantizer(self.encode_sr(sr), learn=False).latents).skips

    def find_neighbours(self, sr: Float[Tensor, "batch 3 height width"], number: int) -> Neighbours:
        """The nearest codes of SR images, `[batch rows columns neighbours]`."""
        latents = self.quantizer.place(self.encode_sr(sr))
        found = find_neighbours(latents.flatten(0, -2), self.quantizer.codes(), number)
        return Neighbours(*(part.unflatten(0, latents.shape[:-1]) for part in found))

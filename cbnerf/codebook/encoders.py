"""VQ autoencoders, and the light encoder and decoder with one code per pixel.

Latents are `[batch rows columns dim]`, with a row and column for each code. Images are
`[batch 3 height width]` with sides divisible by 4, in [-1, 1]; photographs from outside are in
[0, 1] and of any size, see `pad` and `to_unit`. SR images have three further channels, the position
of each pixel in the scene (see `positions`). *Skips* are features of the decoder that the published
refiner's decoder takes as input.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cbnerf.codebook.fsq import build_quantizer
from cbnerf.codebook.imitation import imitation_loss
from cbnerf.codebook.nearest import Neighbours, find_neighbours
from cbnerf.codebook.positions import Positions
from cbnerf.codebook.quantizer import VectorQuantizer, vq_loss
from cbnerf.codebook.views import Views
from cbnerf.config import CodebookConfig, LossConfig

STRIDE = 4
"""Sides of images are multiples of this; pixels per code and side of the published encoder."""
LIGHT_SIDE = 7
"""Receptive field of a code of the light autoencoder, in pixels per side."""
_FLAT = 0.1
"""Value of the constant feature."""
_LATENTS_PER_CODE = 64
"""Sample size of k-means."""


SRBatch = Float[Tensor, "batch channels height width"]
"""Six channels, colours and positions; colours alone where no position is asked for."""


def to_signed(images: Tensor) -> Tensor:
    """Colours in [0, 1] mapped to [-1, 1]; positions stay."""
    signed = torch.cat([images[:, :3] * 2 - 1, images[:, 3:]], dim=1)
    # Channels last makes convolutions faster, on a CPU by a fifth.
    return signed.contiguous(memory_format=torch.channels_last)


def to_unit(images: Tensor) -> Tensor:
    """Images in [-1, 1] mapped to [0, 1]."""
    return (images + 1) / 2


def fill(images: Tensor) -> Tensor:
    """Replicate the last row and column up to sides that are multiples of `STRIDE`."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")


def pad(images: Tensor) -> Tensor:
    """Images of any size in [0, 1] as the networks take them: filled and in [-1, 1]."""
    return to_signed(fill(images))


class Decoded(NamedTuple):
    image: Float[Tensor, "batch 3 height width"]
    skips: tuple[Float[Tensor, "batch _ _ _"], ...]


class Encoder(nn.Module):
    """Images `[batch 3 height width]` to latents `[batch dim rows columns]`."""

    stride: int
    """Pixels per latent and side."""
    imitated: int
    """Stride of the latents of a render that are quantized in training."""

    def select(self, images: Tensor) -> Tensor:
        """The part of an image that the codes describe: all of it."""
        return images

    def start_from(self, images: Iterable[Tensor], *, constant: bool) -> None:
        """Initialise with selected parts of images; by default nothing depends on them."""


class Decoder(nn.Module, ABC):
    """Latents `[batch dim rows columns]` to an image and its skips."""

    @abstractmethod
    def forward(self, latents: Tensor) -> Decoded: ...


class LightEncoder(Encoder):
    """One latent per pixel: linear features of its 7x7 neighbourhood.

    Initialised with the principal components of photographs and one constant feature. On the unit
    sphere the constant dominates where the contrast is low, so flat regions do not get the codes of
    noise.
    """

    stride = 1
    imitated = 4  # Receptive fields of near latents overlap.

    def __init__(self, dim: int):
        super().__init__()
        self.features = nn.Conv2d(3, dim, LIGHT_SIDE, padding=LIGHT_SIDE // 2)

    def select(self, images: Tensor) -> Tensor:
        """Detail only: the image without its smooth part, which the render has already."""
        smooth = F.avg_pool2d(images, STRIDE)
        return images - F.interpolate(smooth, scale_factor=STRIDE, mode="bilinear")

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
    """A batch of SR and HR patches, quantized and decoded. What only a loss without weight would
    read is not computed: its loss is zero."""

    skips: tuple[Float[Tensor, "batch _ _ _"], ...]
    """Decoder features, input of the refiner."""
    reconstruction: Float[Tensor, "batch 3 height width"]
    """The HR patch, decoded from its codes."""
    vq_loss: Float[Tensor, ""]
    imitation_loss: Float[Tensor, ""]
    high_res_indices: Int[Tensor, "batch rows columns"]
    sr_indices: Int[Tensor, "batch sr_rows sr_columns"]
    """In training possibly of every `imitated`-th row and column only."""


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
        weights: LossConfig,
        sr_encoder: Encoder | None = None,
    ):
        super().__init__()
        self._weights = weights
        self.encoder = encoder
        self.sr_encoder = sr_encoder
        self.positions = Positions(config.position_weight) if config.uses_positions else None
        self._features = config.feature_dim
        self.quantizer = build_quantizer(config)
        self.decoder = decoder.requires_grad_(self._decodes)

    @property
    def _decodes(self) -> bool:
        return self._weights.lambda_recon > 0

    @torch.no_grad()
    def start_from(self, views: Views) -> None:
        """Initialise encoders and, with `codebook.kmeans_init`, codes from photographs and the
        positions of their pixels; all processes must pass the same."""
        renders, photographs = views.renders, views.photographs
        quantizer = self.quantizer
        # Finite scalars have few features, and one that is constant would halve them or worse.
        learned = isinstance(quantizer, VectorQuantizer)
        self.encoder.start_from((self._coded(image) for image in photographs), constant=learned)
        if self.sr_encoder is not None:
            self.sr_encoder.load_state_dict(self.encoder.state_dict())
        if self.positions is not None:
            features = (self.encoder(self._coded(image)) for image in photographs)
            self.positions.start_from((render[:, 3:] for render in renders), features)
        if learned and quantizer.config.kmeans_init:
            per_view = -(-_LATENTS_PER_CODE * quantizer.num_codes // len(photographs))
            generator = torch.Generator().manual_seed(0)
            sample: list[Tensor] = []
            for render, image in zip(renders, photographs, strict=True):
                latents = self.encode(self._coded(image), fill(render)).flatten(0, -2)
                chosen = torch.randperm(len(latents), generator=generator)[:per_view]
                sample.append(latents[chosen.to(latents.device)])
            quantizer.start_from(torch.cat(sample))

    def _coded(self, photograph: Tensor) -> Tensor:
        return self.encoder.select(pad(photograph))

    def encode(
        self, coded: Float[Tensor, "batch 3 height width"], sr: SRBatch
    ) -> Float[Tensor, "batch rows columns dim"]:
        """Latents of the selected part of HR images, whose pixels have the positions of the SR
        ones."""
        return self._join(self.encoder(coded), sr)

    def encode_sr(self, sr: SRBatch) -> Float[Tensor, "batch rows columns dim"]:
        """Latents of whole SR images."""
        encoder = self.encoder if self.sr_encoder is None else self.sr_encoder
        return self._join(encoder(encoder.select(sr[:, :3])), sr)

    def _join(self, features: Tensor, sr: SRBatch) -> Float[Tensor, "batch rows columns dim"]:
        if self.positions is not None:
            features = torch.cat([features, self.positions(sr[:, 3:])], dim=1)
        return features.movedim(1, -1)

    def decode(self, latents: Float[Tensor, "batch rows columns dim"]) -> Decoded:
        """An image of the features of latents, whatever their positions."""
        return self.decoder(latents[..., : self._features].movedim(-1, 1))

    def forward(self, sr: SRBatch, high_res: Float[Tensor, "batch 3 height width"]) -> Lookup:
        coded = self.encoder.select(high_res)
        found = self.quantizer(self.encode(coded, sr))
        step = self.encoder.imitated if self.training else 1
        some = (slice(None), slice(None, None, step), slice(None, None, step))
        sr_latents = self.encode_sr(sr)[some]
        imitated = self.quantizer(sr_latents, learn=False)
        target = found._replace(latents=found.latents[some], indices=found.indices[some])
        decoded = Decoded(coded, ())
        if self._decodes:
            decoded = self._decode_pair(found.latents, imitated.latents)
        imitation = coded.new_zeros(())
        if self._weights.lambda_imitation > 0:
            kind = self.quantizer.config.imitation
            imitation = imitation_loss(kind, sr_latents, imitated, target, self.quantizer)
        return Lookup(
            skips=decoded.skips,
            reconstruction=high_res - coded + decoded.image,
            vq_loss=vq_loss(found, self.quantizer.config),
            imitation_loss=imitation,
            high_res_indices=found.indices,
            sr_indices=imitated.indices,
        )

    def _decode_pair(self, high_res: Tensor, sr: Tensor) -> Decoded:
        """The decoded HR latents, with the skips that the refiner is trained on."""
        return self.decode(high_res)

    @torch.no_grad()
    def reconstruct(
        self, sr: SRBatch, photographs: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Photographs decoded from their codes, both in [0, 1] and of any size: the upper bound of
        what the codebook can represent. The render gives the positions."""
        height, width = photographs.shape[-2:]
        padded = pad(photographs)
        coded = self.encoder.select(padded)
        codes = self.quantizer(self.encode(coded, fill(sr)), learn=False)
        decoded = to_unit(padded - coded + self.decode(codes.latents).image)
        return decoded[..., :height, :width].clamp(0, 1)

    def find_neighbours(self, sr: SRBatch, number: int) -> Neighbours:
        """The nearest codes of SR images, `[batch rows columns neighbours]`."""
        latents = self.quantizer.place(self.encode_sr(sr))
        found = find_neighbours(latents.flatten(0, -2), self.quantizer.codes(), number)
        return Neighbours(*(part.unflatten(0, latents.shape[:-1]) for part in found))

"""Refiners: a stage-1 render (SR) goes in, a sharper image comes out, with the help of codes.

Images are `[batch 3 height width]` in [0, 1] at the interface. Inside, and in the losses, they are
in [-1, 1] as in the paper: an L1 there is twice, an MSE four times that of [0, 1].
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cbnerf.codebook.encoders import (
    STRIDE,
    LightDecoder,
    LightEncoder,
    ResidualBlock,
    VQAutoencoder,
)
from cbnerf.codebook.filters import CodeFilters, Corrections
from cbnerf.codebook.quantizer import Neighbours, VectorQuantizer
from cbnerf.codebook.views import Images, MadeOnDemand
from cbnerf.config import Config, LossConfig
from cbnerf.downsampling import Kernel, downsample, spread

DEFAULT_TILE = 1024
"""Side of the tiles that are refined at once, in pixels; images up to it are refined whole."""

_LATENTS_PER_CODE = 64
"""That k-means sees."""
_PASSES = 4
"""Back-projections: the next ones would add little that views held out confirm."""


class Refinement(NamedTuple):
    refined: Float[Tensor, "batch 3 height width"]
    """Not clamped."""
    reconstruction: Float[Tensor, "batch 3 height width"]
    """The HR patch as its codes tell it."""
    vq_loss: Float[Tensor, ""]
    imitation_loss: Float[Tensor, ""]
    high_res_indices: Int[Tensor, "batch rows columns"]
    sr_indices: Int[Tensor, "batch sr_rows sr_columns"]
    """Of every n-th row and column, by the encoder; without training of all."""


class RefinerLosses(NamedTuple):
    total: Float[Tensor, ""]
    refine: Float[Tensor, ""]
    recon: Float[Tensor, ""]
    vq: Float[Tensor, ""]
    imitation: Float[Tensor, ""]


def refiner_losses(
    refinement: Refinement, high_res: Float[Tensor, "batch 3 height width"], weights: LossConfig
) -> RefinerLosses:
    """The four losses of the paper, section 2-4, and their weighted sum."""
    refine = F.l1_loss(_to_signed(refinement.refined), _to_signed(high_res))
    recon = F.mse_loss(_to_signed(refinement.reconstruction), _to_signed(high_res))
    total = (
        weights.lambda_refine * refine
        + weights.lambda_recon * recon
        + weights.lambda_vq * refinement.vq_loss
        + weights.lambda_imitation * refinement.imitation_loss
    )
    return RefinerLosses(total, refine, recon, refinement.vq_loss, refinement.imitation_loss)


def _to_signed(images: Tensor) -> Tensor:
    # Channels last makes all convolutions behind it faster, on a CPU by a fifth.
    return (images * 2 - 1).contiguous(memory_format=torch.channels_last)


def _fill(images: Tensor) -> Tensor:
    """With sides that the codes divide."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")


def _pad(images: Tensor) -> Tensor:
    """Signed, with sides that the codes divide."""
    return _to_signed(_fill(images))


def _to_unit(images: Tensor) -> Tensor:
    return (images + 1) / 2


class Refiner(nn.Module, ABC):
    """What the refiners share: codes for both patches in training, for the SR image alone later."""

    halo: int
    """Pixels, a multiple of 4, that a tile must see around itself to be refined as in the image."""

    def __init__(self, autoencoder: VQAutoencoder):
        super().__init__()
        self.autoencoder = autoencoder

    @abstractmethod
    def _select_coded(self, images: Tensor) -> Tensor:
        """The part of an image that the codes describe."""

    @abstractmethod
    def _sharpen(self, sr: Tensor, skips: tuple[Tensor, ...]) -> Tensor:
        """The refined image, from the render and the decoded features of its codes."""

    @torch.no_grad()
    def start_from(self, photographs: Images) -> None:
        """With `codebook.kmeans_init`, let the codes begin as the commonest of what they will
        describe; all processes must bring the same photographs."""
        quantizer = self.autoencoder.quantizer
        if isinstance(quantizer, VectorQuantizer) and quantizer.config.kmeans_init:
            of_a_view = -(-_LATENTS_PER_CODE * quantizer.num_codes // len(photographs))
            generator = torch.Generator().manual_seed(0)
            some: list[Tensor] = []
            for image in photographs:
                latents = self.autoencoder.encode(self._select_coded(_pad(image))).flatten(0, -2)
                chosen = torch.randperm(len(latents), generator=generator)[:of_a_view]
                some.append(latents[chosen.to(latents.device)])
            quantizer.start_from(torch.cat(some))

    def forward(
        self,
        sr: Float[Tensor, "batch 3 height width"],
        high_res: Float[Tensor, "batch 3 height width"],
    ) -> Refinement:
        """Refine SR patches in training; sides are multiples of 4."""
        sr, high_res = _to_signed(sr), _to_signed(high_res)
        coded = self._select_coded(high_res)
        lookup = self.autoencoder(self._select_coded(sr), coded)
        return Refinement(
            refined=_to_unit(self._sharpen(sr, lookup.skips)),
            reconstruction=_to_unit(high_res - coded + lookup.reconstruction),
            vq_loss=lookup.vq_loss,
            imitation_loss=lookup.imitation_loss,
            high_res_indices=lookup.high_res_indices,
            sr_indices=lookup.sr_indices,
        )

    @torch.no_grad()
    def refine(
        self, sr: Float[Tensor, "batch 3 height width"], *, tile: int = DEFAULT_TILE
    ) -> Float[Tensor, "batch 3 height width"]:
        """Refine whole images of any size, seeing nothing else.

        Memory is that of a tile and its halo; the result is the same for tiles of any side.
        """
        if tile < STRIDE:
            raise ValueError(f"tile = {tile} must be at least {STRIDE} pixels")
        height, width = sr.shape[-2:]
        padded = _pad(sr)
        refined = torch.empty_like(padded)
        side = tile // STRIDE * STRIDE
        for top in range(0, padded.shape[-2], side):
            for left in range(0, padded.shape[-1], side):
                place = (..., slice(top, top + side), slice(left, left + side))
                refined[place] = self._refine_tile(padded, top, left, side)
        return refined[..., :height, :width].clamp(0, 1)

    def _refine_tile(self, padded: Tensor, top: int, left: int, side: int) -> Tensor:
        first_row, first_column = max(top - self.halo, 0), max(left - self.halo, 0)
        sr = padded[..., first_row : top + side + self.halo, first_column : left + side + self.halo]
        top, left = top - first_row, left - first_column
        return _to_unit(self._refine(sr))[..., top : top + side, left : left + side]

    def _refine(self, sr: Tensor) -> Tensor:
        """As much of an image as is refined at once."""
        return self._sharpen(sr, self.autoencoder.look_up(self._select_coded(sr)))

    @torch.no_grad()
    def reconstruct(
        self, high_res: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Photographs as their codes tell them: the ceiling of what a codebook can give."""
        height, width = high_res.shape[-2:]
        padded = _pad(high_res)
        coded = self._select_coded(padded)
        codes = self.autoencoder.quantizer(self.autoencoder.encode(coded), learn=False)
        told = _to_unit(padded - coded + self.autoencoder.decode(codes.latents).image)
        return told[..., :height, :width].clamp(0, 1)


class ResidualRefiner(Refiner):
    """A small CNN corrects the render, then each pixel by the filters of the codes found there.

    The CNN works at half resolution and starts as the identity, the filters as zero. Filters take
    no part in training; `fit_filters` solves them for what the CNN leaves. The codes describe
    detail only, for structure is in the render.
    """

    def __init__(self, config: Config):
        channels, blocks = config.refiner.channels, config.refiner.blocks
        encoder = LightEncoder(config.codebook.latent_dim)
        decoder = LightDecoder(config.codebook.latent_dim)
        # Differs from reference: renders have an encoder of their own, which starts as that of the
        # HR patches. With `vq` nothing would tie the two, and all renders would find one code.
        sr_encoder = None if config.codebook.imitation == "vq" else copy.deepcopy(encoder)
        super().__init__(VQAutoencoder(encoder, decoder, config.codebook, "hr", sr_encoder))
        self.head = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, channels, 3, padding=1))
        self.blocks = nn.Sequential(*(ResidualBlock(channels) for _ in range(blocks)))
        tail = nn.Conv2d(channels, 12, 3, padding=1)
        nn.init.zeros_(tail.weight)
        nn.init.zeros_(tail.bias)  # pyright: ignore[reportArgumentType]
        self.tail = nn.Sequential(tail, nn.PixelShuffle(2))
        num_codes = self.autoencoder.quantizer.num_codes
        self._uses_codes = config.refiner.codes
        self._neighbours = min(config.refiner.neighbours, num_codes - 1)
        self.filters = CodeFilters(num_codes if self._uses_codes else 1)
        # At half resolution 2 pixels for each block and 1 for each of head and tail; or a code:
        # 1 cell of the smooth image, 3 pixels of its encoder.
        self.halo = STRIDE * max(blocks + 1, 3)

    def start_from(self, photographs: Images) -> None:
        """Let encoders and codes begin with what photographs are made of."""
        encoder, sr_encoder = self.autoencoder.encoder, self.autoencoder.sr_encoder
        assert isinstance(encoder, LightEncoder)
        coded = (self._select_coded(_pad(image)) for image in photographs)
        # Finite scalars have few features, and one that is constant would halve them or worse.
        learned = isinstance(self.autoencoder.quantizer, VectorQuantizer)
        encoder.start_from(coded, constant=learned)
        if sr_encoder is not None:
            sr_encoder.load_state_dict(encoder.state_dict())
        super().start_from(photographs)

    @torch.no_grad()
    def fit_filters(
        self,
        renders: Images,
        photographs: Images,
        parts: Sequence[int],
        held_out: Sequence[int],
    ) -> None:
        """Solve the filters of all codes, for views that belong to these `parts`, counted from 0.

        The parts that are `held_out`, each in its turn, choose how much codes may differ. Views are
        asked for several times where they are too many to be held.
        """

        def correct(view: int) -> Corrections:
            sr = _pad(renders[view])
            wanted = _pad(photographs[view]) - self._sharpen(sr, ())
            return Corrections(sr[0], self._find_codes(sr[0]), wanted[0])

        self.filters.fit(_group(correct, parts), held_out)

    @torch.no_grad()
    def back_project(
        self,
        renders: Images,
        photographs: Images,
        kernel: Kernel,
        parts: Sequence[int],
        held_out: Sequence[int],
    ) -> None:
        """Let the filters correct the residuals of refined views, downsampled by `kernel`, against
        their low-res photographs, in a few passes; each residual is spread over the pixels that
        its low-res pixel is made of. `held_out` as in `fit_filters`."""
        scale = renders[0].shape[-1] // photographs[0].shape[-1]
        missing: list[Tensor] = []

        def correct(view: int) -> Corrections:
            sr = _pad(renders[view])[0]
            wanted = _fill(2 * spread(missing[view], scale, kernel))
            return Corrections(sr, self._find_codes(sr), wanted[0])

        for _ in range(_PASSES):
            missing[:] = [
                photograph - downsample(self.refine(render), scale, kernel)
                for render, photograph in zip(renders, photographs, strict=True)
            ]
            filters = copy.deepcopy(self.filters)
            filters.fit(_group(correct, parts), held_out)
            self.filters.table.add_(filters.table)

    @torch.no_grad()
    def add_filter(self, filter: Float[Tensor, "inputs 3"]) -> None:
        """Correct by this filter of the render in [0, 1], too, whatever the code."""
        # x = (signed + 1) / 2: colours keep their factors, the constant takes what they lose.
        constant = filter[:-1].sum(0) + 2 * filter[-1]
        self.filters.table.add_(torch.cat([filter[:-1], constant[None]]))

    def _select_coded(self, images: Tensor) -> Tensor:
        smooth = F.avg_pool2d(images, STRIDE)
        return images - F.interpolate(smooth, scale_factor=STRIDE, mode="bilinear")

    def _sharpen(self, sr: Tensor, skips: tuple[Tensor, ...]) -> Tensor:
        return sr + self.tail(self.blocks(self.head(sr)))

    def _refine(self, sr: Tensor) -> Tensor:
        corrections = [self.filters(image, self._find_codes(image)) for image in sr]
        return self._sharpen(sr, ()) + torch.stack(corrections)

    def _find_codes(self, sr: Float[Tensor, "3 height width"]) -> Neighbours:
        """The nearest codes of each pixel, `[height width neighbours]`."""
        if not self._uses_codes:  # one filter for all
            place = (*sr.shape[1:], 1)
            return Neighbours(sr.new_zeros(place, dtype=torch.int64), sr.new_ones(place))
        found = self.autoencoder.find_neighbours(self._select_coded(sr[None]), self._neighbours)
        return Neighbours(*(part[0] for part in found))


def _group(
    correct: Callable[[int], Corrections], parts: Sequence[int]
) -> list[Sequence[Corrections]]:
    """Views by their parts."""
    return [
        MadeOnDemand(correct, [view for view, own in enumerate(parts) if own == part])
        for part in range(max(parts) + 1)
    ]

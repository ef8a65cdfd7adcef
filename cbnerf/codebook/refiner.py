"""Refiners: a stage-1 render (SR) goes in, a sharper image comes out.

Images are `[batch 3 height width]` in [0, 1] at the interface. In the losses they are in [-1, 1] as
in the paper: an L1 there is twice, an MSE four times that of [0, 1].
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cbnerf.codebook.encoders import STRIDE, SRBatch, VQAutoencoder, pad, to_signed, to_unit
from cbnerf.codebook.health import CodebookHealth
from cbnerf.codebook.views import Views
from cbnerf.config import LossConfig

ImageBatch = Float[Tensor, "batch 3 height width"]
DEFAULT_TILE = 1024
"""Side of the tiles that are refined at once, in pixels; images up to it are refined whole."""


class Refiner(nn.Module, ABC):
    """What stage 2 trains: `fit` solves, `losses` are minimised by gradients, `refine` applies the
    result.

    Parameters without gradient are left to `fit`; a refiner that has no others is solved only.
    """

    solves_unseen = False
    """Whether a scene without high-res photographs is refined by what `fit` solves, without any
    step of training on other scenes."""
    turns_patches = True
    """Whether training patches are flipped and turned at random."""
    needs_references = False
    """Whether patches of a high-res photograph of the scene are an input, as in NeRF-SR."""
    autoencoder: VQAutoencoder | None
    """The codebook and its networks; None without a codebook."""

    def start_from(self, views: Views) -> None:
        """Initialise with training views, before the first step; all processes must pass the
        same."""

    def fit(self, views: Views, low_res: Views | None = None) -> None:
        """Solve the parameters that have no gradient; called once, before the first step.

        `low_res` are views of a scene that has low-res photographs only, to be consistent with.
        """

    def metrics(self) -> dict[str, float]:
        """Metrics of the training since the last call; called at each evaluation."""
        return {}

    def losses(
        self,
        forward: Callable[..., Any],
        sr: SRBatch,
        high_res: Float[Tensor, "batch 3 size size"],
        references: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Scalars to log of a batch of patches; `train/loss` is to be minimised.

        `references` are `[batch references 3 size size]`, given where they are needed.
        `forward` is this module or its DistributedDataParallel wrapper, which synchronises
        gradients when it is called.
        """
        raise NotImplementedError(f"{type(self).__name__} is solved only")

    @abstractmethod
    def refine(
        self, sr: SRBatch, references: Tensor | None = None, *, tile: int = DEFAULT_TILE
    ) -> ImageBatch:
        """Refine whole images of any size; a `TiledRefiner` takes `tile` pixels per side at a
        time."""


class TiledRefiner(Refiner):
    """Refines images tile by tile."""

    halo: int
    """Context in pixels, a multiple of 4, that makes a tile equal to the whole image there."""

    @abstractmethod
    def _refine(self, sr: SRBatch) -> Tensor:
        """SR images refined at test time; [-1, 1]."""

    @torch.no_grad()
    def refine(
        self, sr: SRBatch, references: Tensor | None = None, *, tile: int = DEFAULT_TILE
    ) -> ImageBatch:
        """Refine whole images of any size, from the render alone.

        Memory is that of a tile and its halo; the result does not depend on the tile.
        """
        if tile < STRIDE:
            raise ValueError(f"tile = {tile} must be at least {STRIDE} pixels")
        height, width = sr.shape[-2:]
        padded = pad(sr)
        refined = torch.empty_like(padded[:, :3])
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
        return to_unit(self._refine(sr))[..., top : top + side, left : left + side]


class Refinement(NamedTuple):
    refined: ImageBatch
    """Not clamped."""
    reconstruction: ImageBatch
    """The HR patch, decoded from its codes."""
    vq_loss: Float[Tensor, ""]
    imitation_loss: Float[Tensor, ""]
    high_res_indices: Int[Tensor, "batch rows columns"]
    sr_indices: Int[Tensor, "batch sr_rows sr_columns"]
    """In training possibly of every n-th row and column only, by the encoder."""


class RefinerLosses(NamedTuple):
    loss: Float[Tensor, ""]
    """The weighted sum of the others."""
    refine: Float[Tensor, ""]
    recon: Float[Tensor, ""]
    vq: Float[Tensor, ""]
    imitation: Float[Tensor, ""]


def refiner_losses(
    refinement: Refinement, high_res: ImageBatch, weights: LossConfig, margin: int = 0
) -> RefinerLosses:
    """The four losses of the paper, section 2-4, and their weighted sum; the first one leaves out
    `margin` pixels at each side of a patch."""
    inner = (..., slice(margin, -margin or None), slice(margin, -margin or None))
    refine = F.l1_loss(to_signed(refinement.refined)[inner], to_signed(high_res)[inner])
    recon = F.mse_loss(to_signed(refinement.reconstruction), to_signed(high_res))
    loss = (
        weights.lambda_refine * refine
        + weights.lambda_recon * recon
        + weights.lambda_vq * refinement.vq_loss
        + weights.lambda_imitation * refinement.imitation_loss
    )
    return RefinerLosses(loss, refine, recon, refinement.vq_loss, refinement.imitation_loss)


class CodebookRefiner(TiledRefiner):
    """Refines with codes: those of both patches in training, of the SR image alone at test time."""

    autoencoder: VQAutoencoder
    margin = 0
    """Pixels at the border of a training patch that lack the context of a whole image."""

    def __init__(self, autoencoder: VQAutoencoder, weights: LossConfig):
        super().__init__()
        self.autoencoder = autoencoder
        self._weights = weights
        self._health = CodebookHealth(autoencoder.quantizer.num_codes)

    @abstractmethod
    def _sharpen(self, sr: Tensor, skips: tuple[Tensor, ...]) -> Tensor:
        """SR patches refined in training, with the decoder features of their codes; [-1, 1]."""

    def start_from(self, views: Views) -> None:
        self.autoencoder.start_from(views)

    def metrics(self) -> dict[str, float]:
        """The codebook's health since the last call."""
        metrics = self._health.metrics()
        self._health.clear()
        return metrics

    def forward(
        self,
        sr: SRBatch,
        high_res: ImageBatch,
    ) -> Refinement:
        """Refine SR patches in training; sides are multiples of 4."""
        sr = to_signed(sr)
        lookup = self.autoencoder(sr, to_signed(high_res))
        return Refinement(
            refined=to_unit(self._sharpen(sr, lookup.skips)),
            reconstruction=to_unit(lookup.reconstruction),
            vq_loss=lookup.vq_loss,
            imitation_loss=lookup.imitation_loss,
            high_res_indices=lookup.high_res_indices,
            sr_indices=lookup.sr_indices,
        )

    def losses(
        self,
        forward: Callable[..., Any],
        sr: SRBatch,
        high_res: Float[Tensor, "batch 3 size size"],
        references: Tensor | None = None,
    ) -> dict[str, Tensor]:
        refinement: Refinement = forward(sr, high_res)
        self._health.add(refinement.high_res_indices, refinement.sr_indices)
        losses = refiner_losses(refinement, high_res, self._weights, self.margin)
        return {f"train/{name}": value for name, value in losses._asdict().items()}

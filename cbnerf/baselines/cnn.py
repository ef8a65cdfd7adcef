"""The control of `cb-nerf`: its network alone, without codes and filters."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cbnerf.codebook.encoders import STRIDE, SRBatch, to_signed, to_unit
from cbnerf.codebook.network import ResidualNetwork
from cbnerf.codebook.refiner import ImageBatch, TiledRefiner
from cbnerf.config import Config


class CNNRefiner(TiledRefiner):
    """A residual network corrects the render; its loss is the L1 alone."""

    autoencoder = None
    turns_patches = False

    def __init__(self, config: Config):
        super().__init__()
        self.network = ResidualNetwork(3, config.refiner.channels, config.refiner.blocks)
        self.halo = STRIDE * (config.refiner.blocks + 1)

    def forward(self, sr: SRBatch) -> ImageBatch:
        """Refine SR patches in training."""
        return to_unit(self._refine(to_signed(sr)))

    def _refine(self, sr: SRBatch) -> Tensor:
        return sr[:, :3] + self.network(sr[:, :3])

    def losses(
        self,
        forward: Callable[..., Any],
        sr: SRBatch,
        high_res: Float[Tensor, "batch 3 size size"],
        references: Tensor | None = None,
    ) -> dict[str, Tensor]:
        loss = F.l1_loss(to_signed(forward(sr)), to_signed(high_res))
        return {"train/loss": loss}

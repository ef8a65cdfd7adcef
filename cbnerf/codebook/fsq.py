"""Finite scalar quantization (Mentzer et al., 2023): round each dimension of a latent to one of a
few levels. The codebook is the fixed grid of all combinations.

Codes lie in [-1, 1]^dim; the index enumerates the grid, first dimension fastest.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cbnerf.codebook.quantizer import Quantized, VectorQuantizer
from cbnerf.config import CodebookConfig

# The outermost levels must lie inside the range of tanh.
_MARGIN = 1e-3


class FiniteScalarQuantizer(nn.Module):
    """The interface of `VectorQuantizer`; has no losses and no dead codes to replace."""

    levels: Int[Tensor, " dim"]
    steps: Int[Tensor, " dim"]
    """Stride of each dimension in the index."""

    def __init__(self, config: CodebookConfig):
        super().__init__()
        self.config = config
        self.num_codes = math.prod(config.levels)
        # Squared distances between neighbours lie between 1/16 and 1/4.
        self.temperature = 0.1
        levels = torch.tensor(config.levels)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("steps", levels.cumprod(0) // levels, persistent=False)

    def place(self, latents: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Latents mapped into the range of the grid (FSQ, appendix A.1); zero maps to zero."""
        reach = (self.levels - 1) * (1 + _MARGIN) / 2
        # An even number of levels has one more level below zero than above.
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        squashed = torch.tanh(latents.float() + torch.atanh(offset / reach))
        return (squashed * reach - offset) / self._half

    def codes(self) -> Float[Tensor, "codes dim"]:
        return self.codes_of(torch.arange(self.num_codes, device=self.levels.device))

    def codes_of(self, indices: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        level = indices[..., None] // self.steps % self.levels
        return (level - self._half) / self._half

    def indices_of(self, codes: Float[Tensor, "*batch dim"]) -> Int[Tensor, "*batch"]:
        level = (codes * self._half).round().long() + self._half
        return (level * self.steps).sum(-1)

    def forward(self, latents: Float[Tensor, "*batch dim"], learn: bool = True) -> Quantized:
        """Round to the grid; the gradient is straight-through for the rounding, exact for tanh."""
        placed = self.place(latents)
        codes = (placed.detach() * self._half).round() / self._half
        zero = placed.new_zeros(())
        return Quantized(
            latents=(codes - placed.detach()).add_(placed),
            indices=self.indices_of(codes),
            codebook_loss=zero,
            commitment_loss=zero,
        )

    @property
    def _half(self) -> Int[Tensor, " dim"]:
        return self.levels // 2


Quantizer = VectorQuantizer | FiniteScalarQuantizer


def build_quantizer(config: CodebookConfig) -> Quantizer:
    """The quantizer that `codebook.kind` names."""
    return FiniteScalarQuantizer(config) if config.kind == "fsq" else VectorQuantizer(config)

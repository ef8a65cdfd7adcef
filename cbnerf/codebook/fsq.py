"""Finite scalar quantization (Mentzer et al., 2023): round each dimension of a latent to one of a
few levels; the codebook is the grid of all combinations, and there is nothing in it to learn.

Codes lie in [-1, 1]^dim; an index counts through the grid with the first dimension fastest.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cbnerf.codebook.quantizer import Quantized, VectorQuantizer
from cbnerf.config import CodebookConfig

# The outermost levels must be reached before tanh ends.
_MARGIN = 1e-3


class FiniteScalarQuantizer(nn.Module):
    """The same interface as `VectorQuantizer`; it needs neither losses nor revival."""

    levels: Int[Tensor, " dim"]
    steps: Int[Tensor, " dim"]
    """What a level of each dimension adds to the index."""

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
        """Squash latents into the grid (FSQ, appendix A.1); zero stays zero."""
        reach = (self.levels - 1) * (1 + _MARGIN) / 2
        # An even number of levels has one more below zero than above.
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
        """Round to the grid; gradients pass straight through the rounding, not through tanh."""
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

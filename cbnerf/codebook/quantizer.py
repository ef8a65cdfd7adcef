"""Vector quantization: replace each latent by its nearest code (VQ-VAE).

A *codebook* is a `[codes dim]` matrix, a *code* is one row, an *index* is a row number. Under
torch.distributed the codebook is updated with the latents of all processes, concatenated in rank
order; every process must contribute the same number.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cbnerf.codebook.nearest import append_ones, find_nearest
from cbnerf.config import CodebookConfig

# Stride of the latents in each round of k-means: early rounds use a subset.
_KMEANS_STRIDES = (8, 8, 4, 4, 2, 1)
# Codes with a lower usage are not moved: the quotient of their averages is inexact.
_MIN_USAGE = 1e-5


class Quantized(NamedTuple):
    latents: Float[Tensor, "*batch dim"]
    """Nearest codes, with a straight-through gradient to the input."""
    indices: Int[Tensor, "*batch"]
    codebook_loss: Float[Tensor, ""]
    """Moves codes towards latents; zero if codes are updated by EMA."""
    commitment_loss: Float[Tensor, ""]
    """Moves latents towards codes."""


def vq_loss(quantized: Quantized, config: CodebookConfig) -> Float[Tensor, ""]:
    """Codebook loss + beta * commitment loss (paper, section 2-4); with
    `codebook.vq_loss=released`, beta weighs the codebook loss, as in the released code."""
    codebook, commitment = quantized.codebook_loss, quantized.commitment_loss
    if config.vq_loss == "released":
        return commitment + config.beta * codebook
    return codebook + config.beta * commitment


class VectorQuantizer(nn.Module):
    codebook: Tensor
    """`[codes dim]`; a parameter, without gradient if `codebook.ema`."""
    usage: Tensor
    """Moving average of the uses per step of each code."""
    sums: Tensor
    """Moving average of the sum of the latents that chose each code."""

    def __init__(self, config: CodebookConfig):
        super().__init__()
        self.config = config
        self.num_codes = config.size
        # Distances on the unit sphere are too small for a softmax at temperature 1.
        self.temperature = 0.1 if config.normalize else 1.0
        codes = self.place(torch.randn(config.size, config.latent_dim))
        # With twice the threshold a new code survives log(2) / (1 - decay) steps without use.
        self._first_usage = 2 * config.revive_below if config.revive_below > 0 else 1.0
        self.codebook = nn.Parameter(codes, requires_grad=not config.ema)
        if config.ema:
            self.register_buffer("sums", codes * self._first_usage)
        if config.ema or config.revive_below > 0:
            self.register_buffer("usage", torch.full((config.size,), self._first_usage))

    @torch.no_grad()
    def start_from(self, latents: Float[Tensor, "rows dim"]) -> None:
        """Initialise the codes by k-means (Lloyd) of latents; all processes must pass the same."""
        latents = self.place(latents)
        codes, uses = _spread(latents, self.num_codes), latents.new_zeros(self.num_codes)
        for stride in _KMEANS_STRIDES:
            some = latents[::stride]
            totals = _sum_by_code(some, find_nearest(some, codes), self.num_codes)
            uses = totals[:, -1]
            means = self.place(totals[:, :-1] / uses.clamp(min=1)[:, None])
            codes = torch.where(uses[:, None] > 0, means, _share_out(some, uses == 0))
        # The usage of a step that contains all latents, so that few later ones change it slowly.
        self._replace(torch.ones_like(uses, dtype=torch.bool), codes, uses)

    def place(self, latents: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Latents in float32, on the unit sphere if `codebook.normalize`."""
        latents = latents.float()
        return F.normalize(latents, dim=-1) if self.config.normalize else latents

    def codes(self) -> Float[Tensor, "codes dim"]:
        return self.codebook if self.config.ema else self.place(self.codebook)

    def forward(self, latents: Float[Tensor, "*batch dim"], learn: bool = True) -> Quantized:
        """Nearest codes. In training mode and with `learn`, dead codes are first replaced by some
        of these latents, and codes are updated by EMA (if `codebook.ema`)."""
        latents = self.place(latents)
        flat = latents.detach().flatten(0, -2)
        learn = learn and self.training
        if learn:
            self._revive(flat)
        codes = self.codes()
        indices = find_nearest(flat, codes)
        nearest = F.embedding(indices, codes).view_as(latents)
        if learn:
            self._count(flat, indices)
        zero = latents.new_zeros(())
        return Quantized(
            latents=(nearest.detach() - latents.detach()).add_(latents),
            indices=indices.view(latents.shape[:-1]),
            codebook_loss=zero if self.config.ema else F.mse_loss(nearest, latents.detach()),
            commitment_loss=F.mse_loss(latents, nearest.detach()),
        )

    @torch.no_grad()
    def _revive(self, latents: Tensor) -> None:
        if self.config.revive_below > 0:
            dead = self.usage < self.config.revive_below
            self._replace(dead, _share_out(_gather(latents), dead))

    def _replace(self, which: Tensor, codes: Tensor, uses: Tensor | None = None) -> None:
        self.codebook.copy_(torch.where(which[:, None], codes, self.codebook))
        if hasattr(self, "usage"):
            first = torch.full_like(self.usage, self._first_usage)
            first = first if uses is None else torch.maximum(first, uses)
            self.usage.copy_(torch.where(which, first, self.usage))
        if self.config.ema:
            self.sums.copy_(torch.where(which[:, None], codes * self.usage[:, None], self.sums))

    @torch.no_grad()
    def _count(self, latents: Tensor, indices: Tensor) -> None:
        if not hasattr(self, "usage"):
            return
        totals = _sum_by_code(latents, indices, self.num_codes)
        if _is_distributed():
            dist.all_reduce(totals)
        self.usage.lerp_(totals[:, -1], 1 - self.config.ema_decay)
        if self.config.ema:
            self.sums.lerp_(totals[:, :-1], 1 - self.config.ema_decay)
            means = self.place(self.sums / self.usage.clamp(min=_MIN_USAGE)[:, None])
            used = (self.usage > _MIN_USAGE)[:, None]
            self.codebook.copy_(torch.where(used, means, self.codebook))


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _gather(latents: Tensor) -> Tensor:
    if not _is_distributed():
        return latents
    parts = [torch.empty_like(latents) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, latents.contiguous())
    return torch.cat(parts)


def _sum_by_code(
    latents: Float[Tensor, "rows dim"], indices: Int[Tensor, " rows"], num_codes: int
) -> Float[Tensor, "codes dim_and_count"]:
    # `bincount` would synchronise with the GPU.
    rows = append_ones(latents)
    return rows.new_zeros(num_codes, rows.shape[1]).index_add_(0, indices, rows)


def _share_out(latents: Tensor, dead: Tensor) -> Tensor:
    """A latent for each code: the j-th of d dead codes gets the one in row j * rows / d.

    Runs on the device without synchronisation.
    """
    rows = (dead.cumsum(0) - 1).clamp(min=0) * len(latents) // dead.sum().clamp(min=1)
    return latents[rows]


def _spread(latents: Tensor, size: int) -> Tensor:
    """`size` rows at even strides; if rows repeat, a small fixed noise makes them distinct."""
    rows = torch.arange(size, device=latents.device) * len(latents) // size
    codes = latents[rows]
    if len(latents) < size:
        noise = torch.randn(codes.shape, generator=torch.Generator().manual_seed(0))
        codes = codes + 0.01 * codes.std() * noise.to(codes)
    return codes

"""Imitation: the latents of an SR patch should select the codes of the HR patch at the same place.

SR latents are the encoder's output for the stage-1 render, HR latents that for the photograph; they
correspond row by row.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cbnerf.codebook.fsq import Quantizer
from cbnerf.codebook.nearest import rank_codes, rows_at_once
from cbnerf.codebook.quantizer import Quantized, vq_loss

_LEAST_LOGIT = -60.0
"""Lower bound of exponents: on a CPU exponentials that underflow take several times as long."""


def imitation_loss(
    kind: Literal["vq", "feature", "ce"],
    latents: Float[Tensor, "*batch dim"],
    sr: Quantized,
    high_res: Quantized,
    quantizer: Quantizer,
) -> Float[Tensor, ""]:
    """The loss that ties SR `latents` to the codebook; `sr` and `high_res` are the quantized SR and
    HR latents.

    - `vq` (paper, section 2-4): the VQ loss of the SR latents with their own nearest codes.
    - `feature`: squared distance to the code of the HR latent.
    - `ce`: cross-entropy against the index of the HR latent.

    `vq` has a gradient to the codes as well; the others to the SR latents only.
    """
    if kind == "vq":
        return vq_loss(sr, quantizer.config)
    placed = quantizer.place(latents)
    if kind == "feature":
        return F.mse_loss(placed, high_res.latents.detach())
    codes = quantizer.codes().detach()
    rows, indices = placed.flatten(0, -2), high_res.indices.flatten()
    return index_loss(rows, indices, codes, quantizer.temperature)


def index_loss(
    latents: Float[Tensor, "rows dim"],
    indices: Int[Tensor, " rows"],
    codes: Float[Tensor, "codes dim"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Cross-entropy of softmax(-squared distance / temperature) against the target `indices`, with
    a gradient to the latents only."""
    return _IndexLoss.apply(latents, indices, codes, temperature)


class _IndexLoss(torch.autograd.Function):
    """Computes loss and gradient in chunks of rows: autograd would store rows x codes logits and
    take several times as long."""

    @staticmethod
    def forward(
        ctx: Any, latents: Tensor, indices: Tensor, codes: Tensor, temperature: float
    ) -> Tensor:
        total, gradient = latents.new_zeros(()), torch.empty_like(latents)
        chunks = (x.split(rows_at_once(latents, len(codes))) for x in (latents, indices, gradient))
        with torch.autocast(latents.device.type, enabled=False):
            for some, right, pull in zip(*chunks, strict=True):
                logits = rank_codes(some, codes).mul_(-1 / temperature)
                wanted = logits.gather(1, right[:, None])
                greatest = logits.amax(dim=1, keepdim=True)
                shares = logits.sub_(greatest).clamp_(min=_LEAST_LOGIT).exp_()
                sums = shares.sum(dim=1, keepdim=True)
                total += (sums.log() + greatest - wanted).sum()
                # Gradient: expected code minus target code.
                torch.mm(shares, codes, out=pull).div_(sums).sub_(codes[right])
        ctx.save_for_backward(gradient.mul_(2 / temperature / len(latents)))
        return total / len(latents)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None, None, None

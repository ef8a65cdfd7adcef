"""Imitation: an SR patch must find the codes that the HR patch of the same place finds.

SR latents are the encoder's output for the stage-1 render, HR latents that for the photograph; row
by row they belong to the same place.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cbnerf.codebook.fsq import Quantizer
from cbnerf.codebook.quantizer import Quantized, rank_codes, rows_at_once, vq_loss


def imitation_loss(
    kind: Literal["vq", "feature", "ce"],
    latents: Float[Tensor, "*batch dim"],
    sr: Quantized,
    high_res: Quantized,
    quantizer: Quantizer,
) -> Float[Tensor, ""]:
    """Tie SR `latents` to the codebook; `sr` and `high_res` are what the quantizer made of both.

    Only `vq` can also move codes, as in the paper; the others move nothing but the SR latents.
    """
    if kind == "vq":
        # Paper, section 2-4: any code will do, the HR patch takes no part.
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
    """Cross-entropy of softmax(-squared distance / temperature) against the right index; its
    gradient goes to the latents alone."""
    return _IndexLoss.apply(latents, indices, codes, temperature)


class _IndexLoss(torch.autograd.Function):
    """Loss and gradient of a few rows at a time: all logits, written and read again by autograd,
    would take several times as long, and memory for rows x codes."""

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
                shares = logits.sub_(greatest).exp_()
                sums = shares.sum(dim=1, keepdim=True)
                total += (sums.log() + greatest - wanted).sum()
                # From the right code to the mean of those that are believed in.
                torch.mm(shares, codes, out=pull).div_(sums).sub_(codes[right])
        ctx.save_for_backward(gradient.mul_(2 / temperature / len(latents)))
        return total / len(latents)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None, None, None

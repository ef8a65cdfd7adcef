"""Imitation: an SR patch must find the codes that the HR patch of the same place finds.

SR latents are the encoder's output for the stage-1 render, HR latents that for the photograph; row
by row they belong to the same place.
"""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cbnerf.codebook.fsq import Quantizer
from cbnerf.codebook.quantizer import Quantized, rank_codes, vq_loss


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
    """Cross-entropy of softmax(-squared distance / temperature) against the right index."""
    return F.cross_entropy(-rank_codes(latents, codes) / temperature, indices)

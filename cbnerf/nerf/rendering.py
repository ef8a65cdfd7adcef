"""Volume rendering: densities along a ray give weights, weights give colours (NeRF, eq. 3).

Names of this file: `density` per unit of t, `lengths` of the bins in t, `alpha` the opacity of a
bin, `weights` its contribution to the pixel. t is the NDC distance in [0, 1].
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cbnerf.nerf.sampling import prefix_sums


class Rendering(NamedTuple):
    rgb: Float[Tensor, "rays 3"]
    depth: Float[Tensor, " rays"]
    """Expected NDC distance t; the depth in scene units is 1 / (1 - t)."""


def render_weights(
    density: Float[Tensor, "*rays samples"], lengths: Float[Tensor, "*rays samples"]
) -> Float[Tensor, "*rays samples"]:
    """Weight of each sample: transmittance times alpha; the weights of a ray sum to at most 1.

    Densities 1, 1 with lengths ln 2, ln 2 give alpha 1/2, 1/2, transmittance 1, 1/2 and weights
    1/2, 1/4.
    """
    optical_depth = density * lengths
    alpha = 1 - torch.exp(-optical_depth)
    # The last bin, which may be infinitely long, is not in front of any other.
    before = prefix_sums(optical_depth[..., :-1])
    return alpha * torch.exp(-before)


def reaching_to_infinity(
    lengths: Float[Tensor, "*rays samples"],
) -> Float[Tensor, "*rays samples"]:
    """Make the last bin (nearly) infinitely long, so the weights of each ray sum to 1 (NeRF)."""
    return torch.cat([lengths[..., :-1], torch.full_like(lengths[..., -1:], 1e10)], dim=-1)


def composite(
    rgb: Float[Tensor, "rays samples 3"],
    weights: Float[Tensor, "rays samples"],
    t: Float[Tensor, "rays samples"],
) -> Rendering:
    """Accumulate samples into pixels over a black background (NeRF, eq. 3)."""
    return Rendering(
        rgb=(weights[..., None] * rgb).sum(-2),
        depth=(weights * t).sum(-1),
    )


def super_sampling_loss(
    rgb: Float[Tensor, "rays 3"], target: Float[Tensor, "pixels 3"]
) -> Float[Tensor, ""]:
    """MSE between low-res pixels and the means of their sub-pixel rays (NeRF-SR, eq. 5).

    `rgb` holds the sub-rays of each pixel consecutively; colours in [0, 1].
    """
    mean = rgb.unflatten(0, (target.shape[0], -1)).mean(1)
    return (mean - target).square().mean()

"""Volume rendering: density along a ray becomes weights, weights become colour (NeRF, eq. 3)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cbnerf.nerf.sampling import prefix_sums


class Rendering(NamedTuple):
    rgb: Float[Tensor, "rays 3"]
    depth: Float[Tensor, " rays"]
    """Mean NDC distance t of the content; the metric depth is 1 / (1 - t)."""


def render_weights(
    density: Float[Tensor, "*rays samples"], lengths: Float[Tensor, "*rays samples"]
) -> Float[Tensor, "*rays samples"]:
    """Share of a ray's light that each sample sends: transmittance times alpha."""
    optical_depth = density * lengths
    alpha = 1 - torch.exp(-optical_depth)
    # The last sample, which may be infinitely long, takes no part in what is before it.
    before = prefix_sums(optical_depth[..., :-1])
    return alpha * torch.exp(-before)


def reaching_to_infinity(
    lengths: Float[Tensor, "*rays samples"],
) -> Float[Tensor, "*rays samples"]:
    """The last sample takes all the light that is left (NeRF); no ray ends on black."""
    return torch.cat([lengths[..., :-1], torch.full_like(lengths[..., -1:], 1e10)], dim=-1)


def composite(
    rgb: Float[Tensor, "rays samples 3"],
    weights: Float[Tensor, "rays samples"],
    t: Float[Tensor, "rays samples"],
) -> Rendering:
    """Accumulate samples into pixels, over a black background."""
    return Rendering(
        rgb=(weights[..., None] * rgb).sum(-2),
        depth=(weights * t).sum(-1),
    )


def super_sampling_loss(
    rgb: Float[Tensor, "rays 3"], target: Float[Tensor, "pixels 3"]
) -> Float[Tensor, ""]:
    """MSE between low-res pixels and the means of their sub-pixel rays (NeRF-SR, eq. 5).

    The sub-rays of a pixel stand next to each other.
    """
    mean = rgb.unflatten(0, (target.shape[0], -1)).mean(1)
    return (mean - target).square().mean()

"""The coordinates of planes: which part of NDC their cells and samples cover.

The NDC depth t is linear in disparity from the near plane, which the bounds of the photographs set.
Bounds of structure from motion are often several times too near; then most of [0, 1] is empty.
Planes therefore measure depth by s in [0, 1] (mip-NeRF 360, section 3), which content fills evenly.

Names of this file: `knots` are the t at equally spaced s, increasing from 0 to 1.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cbnerf.nerf.rays import Cameras, Rays, ndc_extent
from cbnerf.nerf.sampling import prefix_sums

NUM_KNOTS = 65
_FLOOR = 0.1
"""Share of s that is spread evenly whatever the weights are, so that no depth is lost."""


class PlaneSpace(nn.Module):
    """Points of rays in [-1, 1]^3, as planes see them."""

    def __init__(self, cameras: Cameras, knots: Float[Tensor, " knots"]):
        super().__init__()
        extent = ndc_extent(cameras)
        self.extent: Tensor
        self.register_buffer("extent", torch.cat([extent, torch.ones_like(extent[:, :1])], dim=1))
        self.knots: Tensor
        self.register_buffer("knots", knots)

    def points(
        self, rays: Rays, s: Float[Tensor, "rays samples"]
    ) -> Float[Tensor, "rays samples 3"]:
        """At each depth the planes cover just what the cameras see there.

        Near the cameras that extent can be several times that at infinity, most of it empty.
        """
        t = self.to_t(s)[..., None]
        points = rays.origins[:, None] + t * rays.directions[:, None]
        points = points / torch.lerp(self.extent[0], self.extent[1], t)
        return torch.cat([points[..., :2], 2 * s[..., None] - 1], dim=-1)

    def directions(self, rays: Rays) -> Float[Tensor, "rays 3"]:
        """NDC directions over the extent at the near plane; with a near plane that is far too near,
        both grow in proportion."""
        return rays.directions / self.extent[0]

    def to_t(self, s: Float[Tensor, "rays samples"]) -> Float[Tensor, "rays samples"]:
        """NDC depth."""
        return to_t(self.knots, s)


def to_t(
    knots: Float[Tensor, " knots"], s: Float[Tensor, "*rays samples"]
) -> Float[Tensor, "*rays samples"]:
    """Interpolate t linearly between knots: with knots [0, .8, 1], s = .25 is t = .4."""
    last = len(knots) - 1
    before = (s * last).floor().clamp(0, last - 1)
    first = before.int()
    return torch.lerp(knots[first], knots[first + 1], s * last - before)


def spread_over_bounds(nears: Float[Tensor, " views"]) -> Float[Tensor, " knots"]:
    """Knots from the depths of the nearest content that each view claims, in any unit.

    The smallest of them is the near plane, t = 0. Each view votes for an even spread from its own
    nearest content to infinity; so one view whose bound is far too near has one vote.
    """
    starts = 1 - nears.double().min() / nears.double()
    s = torch.linspace(0, 1, NUM_KNOTS, dtype=torch.float64)
    low, high = torch.zeros_like(s), torch.ones_like(s)
    for _ in range(60):  # bisection: the mean of the votes increases with t
        middle = (low + high) / 2
        votes = ((middle[:, None] - starts) / (1 - starts)).clamp(0, 1).mean(1)
        low, high = torch.where(votes < s, middle, low), torch.where(votes < s, high, middle)
    return _fix_ends(high.float())


def concentrate(
    knots: Float[Tensor, " knots"], weights: Float[Tensor, " bins"]
) -> Float[Tensor, " knots"]:
    """Knots that give more of s to the bins where content is.

    `weights` are the mean rendering weights of equal bins of the present s. A bin gets s in
    proportion to its weight, up to half the mean weight: bins with content get equal parts, those
    with a little fog, which a short training leaves, get little. Then neighbours are averaged and
    the floor is added.
    """
    clipped = weights.double().clamp(max=float(weights.mean()) / 2)
    smooth = F.avg_pool1d(F.pad(clipped[None], (1, 1), mode="replicate"), 3, stride=1)[0]
    share = (1 - _FLOOR) * smooth / smooth.sum() + _FLOOR / len(weights)
    cumulative = prefix_sums(share) / share.sum()
    s = torch.linspace(0, 1, len(knots), dtype=torch.float64, device=knots.device)
    bins = torch.searchsorted(cumulative, s, right=True).clamp(1, len(weights)) - 1
    within = (s - cumulative[bins]) / share[bins] * share.sum()
    return _fix_ends(to_t(knots, ((bins + within.clamp(0, 1)) / len(weights)).float()))


def _fix_ends(knots: Tensor) -> Tensor:
    """Knots from exactly 0 to exactly 1."""
    knots[0], knots[-1] = 0, 1
    return knots

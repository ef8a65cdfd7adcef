"""Choice of sub-pixel rays, and of sample positions along rays.

Names of this file: `t` are distances along a ray in NDC, in [0, 1]; `edges` are the ends of bins,
one more than there are `weights`; `jitter` are random numbers in [0, 1) from the caller, and None
stands for 0.5 everywhere (deterministic).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def prefix_sums(
    values: Float[Tensor, "*rays values"],
) -> Float[Tensor, "*rays values_plus_1"]:
    """Exclusive prefix sums, followed by the total: [1, 2, 3] gives [0, 1, 3, 6].

    A matrix product, because `cumsum` on GPUs is not deterministic. Values must be finite.
    """
    count = values.shape[-1]
    return values @ torch.ones(count, count + 1, dtype=values.dtype, device=values.device).triu(1)


def choose_sub_pixels(
    scores: Float[Tensor, "pixels sub_pixels"], number: int, *, opposite: bool
) -> Int[Tensor, "pixels sub_rays"]:
    """Draw `number` sub-pixels of each pixel without replacement: those with the lowest scores.

    `scores` are independent random numbers, one for each sub-pixel, row by row. With `opposite` and
    an even `number`, sub-pixels are drawn in pairs that are symmetric about the pixel centre, so a
    linear colour gradient across the pixel cancels in their mean. In a grid of odd size the centre
    sub-pixel has no partner and is drawn less often than the others.
    """
    if opposite and number % 2 == 0:
        scores = torch.minimum(scores, scores.flip(1))
    return scores.argsort(dim=1, stable=True)[:, :number]


def sample_stratified(
    num_rays: int,
    num_bins: int,
    jitter: Float[Tensor, "rays bins_plus_1"] | None,
    device: torch.device,
) -> Float[Tensor, "rays bins_plus_1"]:
    """Edges of equal bins over [0, 1]; `jitter` moves each inner edge by up to half a bin."""
    edges = torch.linspace(0, 1, num_bins + 1, device=device).expand(num_rays, -1)
    if jitter is None:
        return edges
    moved = edges + (jitter - 0.5) / num_bins
    return torch.cat([edges[:, :1], moved[:, 1:-1], edges[:, -1:]], dim=1)


def sample_importance(
    edges: Float[Tensor, "rays bins_plus_1"],
    weights: Float[Tensor, "rays bins"],
    num_samples: int,
    jitter: Float[Tensor, "rays samples"] | None,
) -> Float[Tensor, "rays samples"]:
    """Sorted samples `t` of the piecewise-constant density given by `weights` (inverse CDF).

    Stratified: sample i lies in the i-th of `num_samples` intervals of equal probability. Bins
    [0, .5], [.5, 1] with weights 1, 3 and four samples without jitter give .25, .58, .75, .92.
    (NeRF, section 5.2: hierarchical sampling.)
    """
    # 1e-4 keeps every bin reachable (NeRF's code uses 1e-5 on weights that sum to one).
    density = weights + 1e-4
    cdf = prefix_sums(density / density.sum(-1, keepdim=True))
    offset = 0.5 if jitter is None else jitter
    quantiles = (torch.arange(num_samples, device=edges.device) + offset) / num_samples
    quantiles = quantiles.expand(edges.shape[0], -1).contiguous()
    bins = torch.searchsorted(cdf, quantiles, right=True).clamp(1, weights.shape[-1]) - 1
    low_cdf, high_cdf = cdf.gather(-1, bins), cdf.gather(-1, bins + 1)
    low, high = edges.gather(-1, bins), edges.gather(-1, bins + 1)
    share = ((quantiles - low_cdf) / (high_cdf - low_cdf).clamp_min(1e-8)).clamp(0, 1)
    return low + share * (high - low)

"""Which rays to draw, and where to sample along them.

`t` are distances along a ray in [0, 1]; `edges` bound bins, one more than the bins' `weights`.
Random numbers come from the caller as `jitter` in [0, 1); None gives the deterministic middle.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def prefix_sums(
    values: Float[Tensor, "*rays values"],
) -> Float[Tensor, "*rays values_plus_1"]:
    """Sums of the values before each, and of all: a product, for on GPUs `cumsum` adds in no fixed
    order. Values must be finite."""
    count = values.shape[-1]
    return values @ torch.ones(count, count + 1, device=values.device).triu(1)


def choose_sub_pixels(
    scores: Float[Tensor, "pixels sub_pixels"], number: int, *, opposite: bool
) -> Int[Tensor, "pixels sub_rays"]:
    """The `number` sub-pixels of lowest score, a random one for each.

    With `opposite` both of two that face each other about the middle of their pixel are chosen, or
    neither: what grows evenly across a pixel cancels in their mean. Odd numbers are drawn freely;
    the middle one of an odd grid has no other half and comes less often than a pair.
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
    """Edges of equal bins over [0, 1]; with jitter each inner edge moves within half a bin."""
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
    """Sorted `t` that follow the piecewise-constant density of `weights`, by inverting its CDF.

    Stratified: sample i comes from the i-th of `num_samples` equal shares of the probability.
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

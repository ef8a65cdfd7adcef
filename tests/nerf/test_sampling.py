import pytest
import torch

from cbnerf.nerf.sampling import (
    choose_sub_pixels,
    prefix_sums,
    sample_importance,
    sample_stratified,
)

CPU = torch.device("cpu")


def draw(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def test_prefix_sums_are_those_of_cumsum():
    values = draw(3, 50, 24)
    expected = torch.nn.functional.pad(values.double().cumsum(-1), (1, 0))
    torch.testing.assert_close(prefix_sums(values).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("opposite", [False, True])
@pytest.mark.parametrize("scale, number", [(2, 1), (2, 2), (2, 4), (3, 2), (3, 3), (4, 6)])
def test_every_sub_pixel_is_drawn_once_and_as_often_as_any_other(scale, number, opposite):
    chosen = choose_sub_pixels(draw(20_000, scale**2), number, opposite=opposite)
    assert (chosen.sort().values.diff() > 0).all()
    shares = torch.bincount(chosen.flatten(), minlength=scale**2) / len(chosen)
    # The middle of an odd grid has no other half, and comes less often than a pair.
    others = torch.arange(scale**2) != (scale**2 // 2 if opposite and scale == 3 else -1)
    assert shares[others].std() < 0.02


@pytest.mark.parametrize("scale, number", [(2, 2), (4, 2), (4, 6)])
def test_what_grows_evenly_across_a_pixel_cancels_in_opposite_sub_pixels(scale, number):
    chosen = choose_sub_pixels(draw(100, scale**2), number, opposite=True)
    ramp = 3 * (chosen % scale) - 2 * (chosen // scale).float()
    torch.testing.assert_close(ramp.mean(1), torch.full((100,), (scale - 1) / 2))
    free = choose_sub_pixels(draw(100, scale**2), number, opposite=False)
    assert (3 * (free % scale) - 2 * (free // scale).float()).mean(1).std() > 0.3


def test_stratified_edges_stay_within_half_a_bin():
    edges = sample_stratified(200, 8, draw(200, 9), CPU)
    even = torch.arange(9) / 8
    assert ((edges - even).abs() <= 0.5 / 8 + 1e-6).all()
    assert (edges.diff() >= 0).all()
    assert (edges[:, 0] == 0).all() and (edges[:, -1] == 1).all()
    # They use the whole of their bins.
    assert (edges[:, 1:-1].std(0) - 1 / 8 / 12**0.5).abs().max() < 0.005


def test_without_jitter_bins_are_equal():
    torch.testing.assert_close(
        sample_stratified(2, 4, None, CPU), torch.tensor([0, 0.25, 0.5, 0.75, 1]).expand(2, -1)
    )


def invert_cdf(edges: list[float], weights: list[float], quantile: float) -> float:
    """Walk along the bins until the share of the probability is used up."""
    density = [weight + 1e-4 for weight in weights]
    left = quantile * sum(density)
    for low, high, mass in zip(edges, edges[1:], density, strict=False):
        if left <= mass:
            return low + left / mass * (high - low)
        left -= mass
    return edges[-1]


@pytest.mark.parametrize("jittered", [True, False])
def test_importance_samples_invert_the_cdf(jittered: bool):
    rays, bins, samples = 20, 6, 10
    edges = draw(rays, bins + 1).sort(-1).values
    weights = draw(rays, bins) * (draw(rays, bins) > 0.5)  # some bins are empty
    jitter = draw(rays, samples) if jittered else None
    found = sample_importance(edges, weights, samples, jitter)
    for ray in range(rays):
        offsets = jitter[ray].tolist() if jitter is not None else [0.5] * samples
        expected = [
            invert_cdf(edges[ray].tolist(), weights[ray].tolist(), (i + offset) / samples)
            for i, offset in enumerate(offsets)
        ]
        torch.testing.assert_close(found[ray], torch.tensor(expected), atol=1e-5, rtol=0)


def test_importance_samples_are_sorted_and_inside():
    edges = sample_stratified(50, 16, draw(50, 17), CPU)
    found = sample_importance(edges, draw(50, 16) ** 8, 32, draw(50, 32))
    assert (found.diff() >= 0).all()
    assert 0 <= found.min() and found.max() <= 1


def test_samples_gather_where_the_weight_is():
    weights = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    found = sample_importance(sample_stratified(1, 4, None, CPU), weights, 100, None)
    assert ((found >= 0.5) & (found <= 0.75)).float().mean() >= 0.99


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_equal_weights_sample_evenly(weight: float):
    found = sample_importance(
        sample_stratified(1, 4, None, CPU), torch.full((1, 4), weight), 8, None
    )
    torch.testing.assert_close(found[0], (torch.arange(8) + 0.5) / 8)

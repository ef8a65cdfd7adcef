import math

import pytest
import torch

from cbnerf.nerf.rendering import (
    composite,
    reaching_to_infinity,
    render_weights,
    super_sampling_loss,
)


@pytest.mark.parametrize("samples", [1, 7, 64])
@pytest.mark.parametrize("density", [0.1, 3.0])
def test_constant_density_gives_the_closed_form_however_it_is_cut(samples: int, density: float):
    lengths = torch.rand(1, samples, generator=torch.Generator().manual_seed(0))
    lengths *= 1.5 / lengths.sum()
    weights = render_weights(torch.full((1, samples), density), lengths)
    assert weights.sum().item() == pytest.approx(1 - math.exp(-density * 1.5), rel=1e-5)
    # Each weight is the light lost between its ends.
    ends = torch.cat([torch.zeros(1), lengths[0].cumsum(0)])
    transmittance = torch.exp(-density * ends)
    torch.testing.assert_close(weights[0], -transmittance.diff(), atol=1e-6, rtol=1e-5)


def test_opaque_first_sample_hides_the_rest():
    density = torch.tensor([[1e10, 5.0, 1e10]])
    weights = render_weights(density, torch.ones(1, 3))
    assert weights.tolist() == [[1, 0, 0]]


def test_weights_share_at_most_all_light():
    density = 10 ** (8 * torch.rand(100, 32, generator=torch.Generator().manual_seed(0)) - 4)
    weights = render_weights(density, torch.full((100, 32), 1 / 32))
    assert (weights >= 0).all()
    assert (weights.sum(-1) <= 1 + 1e-5).all()


def test_a_ray_to_infinity_ends_on_content():
    density = 0.3 * torch.rand(20, 8, generator=torch.Generator().manual_seed(0)) + 0.01
    lengths = torch.full((20, 8), 1 / 8)
    short, far = render_weights(density, lengths), reaching_to_infinity(lengths)
    weights = render_weights(density, far)
    torch.testing.assert_close(weights.sum(-1), torch.ones(20))
    assert torch.equal(weights[:, :-1], short[:, :-1])


def test_gradients_stay_finite_from_empty_to_opaque():
    density = torch.tensor([[0.0, 1e-6, 1e5, 1e5, 0.0]], requires_grad=True)
    lengths = torch.tensor([[0.1, 0.1, 0.1, 1e10, 1e10]])
    render_weights(density, lengths).square().sum().backward()
    assert density.grad is not None and density.grad.isfinite().all()


def test_composite_by_hand():
    rgb = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.5]]])
    out = composite(rgb, torch.tensor([[0.5, 0.25]]), torch.tensor([[0.2, 0.8]]))
    torch.testing.assert_close(out.rgb, torch.tensor([[0.5, 0.25, 0.125]]))
    torch.testing.assert_close(out.depth, torch.tensor([0.3]))


def test_super_sampling_loss_by_hand():
    # Two pixels of two sub-rays: means 0.5 and 0.2 in every channel.
    rgb = torch.tensor([0.2, 0.8, 0.1, 0.3])[:, None].expand(-1, 3)
    target = torch.tensor([[0.5, 0.5, 0.5], [0.2, 0.2, 0.5]])
    assert super_sampling_loss(rgb, target).item() == pytest.approx(0.09 / 6)


def test_super_sampling_loss_leaves_sub_pixels_free_to_differ():
    rgb = torch.tensor([[0.0] * 3, [1.0] * 3, [0.4] * 3, [0.6] * 3])
    assert super_sampling_loss(rgb, torch.full((2, 3), 0.5)).item() == pytest.approx(0, abs=1e-12)

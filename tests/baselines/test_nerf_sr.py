import pytest
import torch

from cbnerf.baselines.nerf_sr import ReferenceRefiner
from cbnerf.overrides import with_overrides
from cbnerf.presets import METHODS


def make_refiner(channels: int = 4) -> ReferenceRefiner:
    torch.manual_seed(0)
    return ReferenceRefiner(
        with_overrides(METHODS["nerf-sr"], {"refiner.channels": channels})
    ).eval()  # fmt: skip


def draw(batch: int = 1, references: int = 3, height: int = 16, width: int = 24):
    generator = torch.Generator().manual_seed(1)
    sr = torch.rand(batch, 3, height, width, generator=generator)
    return sr, torch.rand(batch, references, 3, height, width, generator=generator)


def test_weights_are_those_of_the_published_network():
    """Reference systems, section 2.3 (b): 30.3 million with 128 channels at the first scale."""
    parameters = sum(p.numel() for p in make_refiner(128).parameters())
    assert parameters == pytest.approx(30.3e6, rel=2e-3)


def test_order_of_references_and_repetitions_do_not_matter():
    refiner = make_refiner()
    sr, references = draw()
    refined = refiner.refine(sr, references)
    torch.testing.assert_close(refiner.refine(sr, references.flip(1)), refined)
    twice = torch.cat([references, references], dim=1)
    torch.testing.assert_close(refiner.refine(sr, twice), refined)


def test_render_and_references_both_count():
    refiner = make_refiner()
    sr, references = draw()
    refined = refiner.refine(sr, references)
    assert not torch.allclose(refiner.refine(1 - sr, references), refined)
    assert not torch.allclose(refiner.refine(sr, 1 - references), refined)


def test_the_position_of_a_pixel_does_not_matter():
    refiner = make_refiner()
    sr, references = draw()
    placed = torch.cat([sr, torch.randn_like(sr)], dim=1)
    assert torch.equal(refiner.refine(placed, references), refiner.refine(sr, references))


@pytest.mark.parametrize("height, width", [(1, 1), (9, 13), (16, 8)])
def test_images_of_any_size_stay_in_range(height: int, width: int):
    refined = make_refiner().refine(*draw(2, 3, height, width))
    assert refined.shape == (2, 3, height, width) and not refined.requires_grad
    assert 0 <= refined.min() and refined.max() <= 1


def test_every_parameter_gets_a_gradient():
    refiner = make_refiner().train()
    refiner(*draw(batch=2)).mean().backward()
    assert not [n for n, p in refiner.named_parameters() if p.grad is None]

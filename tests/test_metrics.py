import math

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from cbnerf.data.scene import Capture
from cbnerf.metrics import psnr, ssim, to_8bit


@pytest.fixture
def pair(tiny_capture: Capture) -> tuple[torch.Tensor, torch.Tensor]:
    """A photograph, and the same with noise."""
    image = tiny_capture.images[0]
    noise = 20 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    return (image + noise).clamp(0, 255).to(torch.uint8), image


def test_psnr_equals_that_of_scikit_image(pair):
    image, target = pair
    expected = peak_signal_noise_ratio(target.numpy(), image.numpy())
    assert psnr(image, target) == pytest.approx(expected, rel=1e-9)


def test_ssim_equals_that_of_scikit_image(pair):
    # Both leave out a border of 5 pixels, where the window would reach outside.
    image, target = pair
    expected = structural_similarity(
        target.numpy(), image.numpy(),
        channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    )  # fmt: skip
    assert 0.1 < expected < 0.99
    assert ssim(image, target) == pytest.approx(expected, abs=1e-5)


def test_psnr_by_hand():
    black = torch.zeros(12, 12, 3, dtype=torch.uint8)
    assert psnr(black + 51, black) == pytest.approx(20 * math.log10(5))
    assert psnr(black, black + 255) == 0
    assert psnr(black, black) == math.inf
    assert ssim(black, black) == pytest.approx(1)


def test_saved_values_are_clamped_and_rounded_not_truncated_or_wrapped():
    image = torch.tensor([-0.5, 0.0, 0.49 / 255, 0.51 / 255, 254.51 / 255, 1.0, 1.5])
    assert to_8bit(image).tolist() == [0, 0, 0, 1, 255, 255, 255]


def test_eight_bits_survive_the_way_through_unit_range():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_8bit(levels.float() / 255), levels)

import math

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from cbnerf.data.scene import Capture
from cbnerf.metrics import flip, psnr, ssim, to_8bit


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


def test_without_its_package_there_is_no_flip(pair, monkeypatch):
    monkeypatch.setattr("cbnerf.metrics.find_spec", lambda name: None)
    assert flip(*pair) is None


@pytest.fixture
def needs_flip() -> None:
    pytest.importorskip("flip_evaluator", reason="needs the extra `flip`")


@pytest.mark.usefixtures("needs_flip")
def test_flip_is_zero_for_equal_images_only_and_symmetric(pair):
    image, target = pair
    assert flip(target, target) == 0
    found = flip(image, target)
    assert found is not None and 0 < found < 1
    assert flip(target, image) == pytest.approx(found, rel=1e-5)


@pytest.mark.usefixtures("needs_flip")
def test_flip_grows_with_noise(pair):
    _, target = pair
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    errors = [
        flip((target + strength * noise).clamp(0, 255).to(torch.uint8), target)
        for strength in (1, 5, 20, 80)
    ]
    assert errors == sorted(errors) and len(set(errors)) == 4


@pytest.mark.usefixtures("needs_flip")
def test_flip_of_black_and_white_is_nearly_one():
    black = torch.zeros(24, 24, 3, dtype=torch.uint8)
    found = flip(black, black + 255)
    assert found is not None and 0.9 < found <= 1

import pytest
import torch
import torch.nn.functional as F

from cbnerf.baselines.linear import SIDE, LinearRefiner
from cbnerf.codebook.views import Views
from cbnerf.presets import METHODS

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def draw_images(count: int, height: int = 70, width: int = 30) -> list[torch.Tensor]:
    """Taller than the strips in which images are unfolded."""
    generator = torch.Generator().manual_seed(0)
    return [0.3 + 0.4 * torch.rand(3, height, width, generator=generator) for _ in range(count)]


def pairs_of(kernel: torch.Tensor, bias: torch.Tensor, images: list[torch.Tensor]) -> Pairs:
    """Each image with what a known filter makes of it."""
    padded = [F.pad(image[None], (SIDE // 2,) * 4, mode="replicate") for image in images]
    return [(a, F.conv2d(b, kernel, bias)[0]) for a, b in zip(images, padded, strict=True)]


def make_refiner() -> LinearRefiner:
    return LinearRefiner(METHODS["linear"])


def fit_filter(refiner: LinearRefiner, pairs: Pairs) -> float:
    renders, photographs = ([image[None] for image in part] for part in zip(*pairs, strict=True))
    refiner.fit(Views(renders, photographs))
    return refiner.metrics()["train/loss"]


def test_an_unfitted_filter_is_the_identity():
    image = torch.stack(draw_images(1))
    torch.testing.assert_close(make_refiner().refine(image), image)


def test_a_known_filter_is_found_again():
    generator = torch.Generator().manual_seed(1)
    kernel = 0.02 * torch.randn(3, 3, SIDE, SIDE, generator=generator)
    kernel += torch.nn.init.dirac_(torch.empty_like(kernel))
    bias = torch.tensor([0.01, -0.02, 0.03])
    refiner = make_refiner()
    error = fit_filter(refiner, pairs_of(kernel, bias, draw_images(2)))
    torch.testing.assert_close(refiner.filter.weight, kernel, atol=1e-5, rtol=0)
    torch.testing.assert_close(refiner.filter.bias, bias, atol=1e-5, rtol=0)
    assert error == pytest.approx(0, abs=1e-10)


def test_no_other_filter_has_a_smaller_error():
    images = draw_images(3)
    pairs = list(zip(images[:2], images[1:], strict=True))
    refiner = make_refiner()
    error = fit_filter(refiner, pairs)

    def error_of(filter: torch.nn.Conv2d) -> float:
        with torch.no_grad():
            squares = [(filter(a[None])[0] - b).square().mean() for a, b in pairs]
        return float(torch.stack(squares).mean())

    assert error == pytest.approx(error_of(refiner.filter), rel=1e-4)
    for parameter in refiner.parameters():
        for step in (-1e-2, 1e-2):
            with torch.no_grad():
                parameter.view(-1)[0] += step
            assert error_of(refiner.filter) > error
            with torch.no_grad():
                parameter.view(-1)[0] -= step


def test_the_position_of_a_pixel_does_not_matter():
    render, photograph = (image[None] for image in draw_images(2))
    placed = torch.cat([render, torch.randn_like(render)], dim=1)
    alone, refiner = make_refiner(), make_refiner()
    for fitted, seen in ((alone, render), (refiner, placed)):
        fitted.fit(Views([seen], [photograph]))
    assert torch.equal(refiner.refine(placed), alone.refine(render))
    assert not torch.equal(alone.refine(render), render)


def test_flat_images_have_a_solution_too():
    """The system is rank-deficient: all pixels of a neighbourhood are alike."""
    flat = torch.full((3, 16, 16), 0.5)
    refiner = make_refiner()
    assert fit_filter(refiner, [(flat, 0.5 * flat)]) == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(refiner.refine(flat[None]), 0.5 * flat[None])

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cbnerf.baselines.linear import LinearRefiner
from cbnerf.codebook.consistency import fit_consistent_filter
from cbnerf.codebook.neighbourhoods import INPUTS, SIDE, Neighbourhoods
from cbnerf.codebook.views import Views
from cbnerf.downsampling import REACH, Kernel, downsample
from cbnerf.metrics import to_8bit
from cbnerf.presets import METHODS

SCALE = 2


def smooth_images(count: int, side: int = 48) -> list[Tensor]:
    """Random, but alike from pixel to pixel, within (0, 1) far from the ends."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(count, 3, side + 2, side + 2, generator=generator)
    # Of 8 bits, for that is what refined views are rounded to.
    return list(to_8bit(0.3 + 0.4 * F.avg_pool2d(noise, 3, stride=1)).float() / 255)


def corrected(render: Tensor, filter: Tensor) -> Tensor:
    """The render and what a filter of it adds."""
    refiner = LinearRefiner(METHODS["linear"])
    refiner.add_filter(filter)
    return refiner.filter(render[None])[0].detach()


def sharpener(strength: float) -> Tensor:
    """Each pixel less the mean of its 3x3 neighbours, of its own colour; and a brightness."""
    kernel = torch.zeros(3, 3, SIDE, SIDE)
    for channel in range(3):
        kernel[channel, channel, 2:5, 2:5] = -strength / 9
        kernel[channel, channel, 3, 3] += strength
    constant = torch.tensor([[0.01, 0.0, -0.01]])
    return torch.cat([kernel.movedim(1, -1).flatten(1).T, constant])


def shrink(image: Tensor, kernel: Kernel) -> Tensor:
    return downsample(image[None], SCALE, kernel)[0]


def views_of(images: list[Tensor], filter: Tensor, kernel: Kernel = "box") -> Views:
    """Renders beside low-res photographs of what a filter makes of them."""
    low_res = [shrink(corrected(image, filter), kernel)[None] for image in images]
    return Views([image[None] for image in images], low_res)


def fit(views: Views, weight: float, kernel: Kernel) -> Tensor:
    """For a refiner that leaves renders as they are."""
    return fit_consistent_filter(lambda render: render, views, weight, kernel)


def low_res_error(views: Views, filter: Tensor, kernel: Kernel = "box") -> float:
    errors = []
    for (render,), (photograph,) in zip(views.renders, views.photographs, strict=True):
        shrunk = shrink(corrected(render, filter), kernel)
        errors.append((shrunk - photograph).square().mean())
    return float(torch.stack(errors).mean())


def change(views: Views, filter: Tensor) -> float:
    changes = [(corrected(render, filter) - render).square().mean() for (render,) in views.renders]
    return float(torch.stack(changes).mean())


def test_what_agrees_already_is_left_alone():
    views = views_of(smooth_images(3), torch.zeros(INPUTS, 3))
    found = fit(views, 10.0, "box")
    assert change(views, found) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kernel", REACH)
def test_a_filter_is_found_from_low_res_pixels_and_serves_other_views(kernel: Kernel):
    images, truth = smooth_images(12), sharpener(0.5)
    found = fit(views_of(images[:10], truth, kernel), 1e3, kernel)
    for image in images[10:]:
        wanted = corrected(image, truth)
        before = (image - wanted).square().mean()
        assert (corrected(image, found) - wanted).square().mean() < 0.2 * before


def test_the_filter_minimises_what_it_says():
    views, weight = views_of(smooth_images(4), sharpener(0.5)), 7.0
    found = fit(views, weight, "box")

    def objective(filter: Tensor) -> float:
        return weight * low_res_error(views, filter) + change(views, filter)

    least = objective(found)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        step = 0.03 * torch.randn(INPUTS, 3, generator=generator)
        assert objective(found + step) > least


@pytest.mark.parametrize("kernel", REACH)
@pytest.mark.parametrize("scale", [2, 3])
def test_the_slope_of_what_is_minimised_vanishes(monkeypatch, kernel: Kernel, scale: int):
    """By autograd through the whole image, while the filter is found strip by strip."""
    monkeypatch.setattr("cbnerf.codebook.consistency.ROWS", 48 * scale * 4)
    image, weight = smooth_images(1)[0], 7.0
    photograph = downsample(corrected(image, sharpener(0.5))[None], scale, kernel)[0]
    found = fit(Views([image[None]], [photograph[None]]), weight, kernel)
    rows = Neighbourhoods([image]).rows(torch.arange(image[0].numel())).double()

    def slope(filter: Tensor) -> Tensor:
        filter = filter.double().requires_grad_()
        changed = (rows @ filter).T.view_as(image)
        low_res = downsample((image.double() + changed)[None], scale, kernel)[0]
        error = (low_res - photograph.double()).square().mean()
        (weight * error + changed.square().mean()).backward()
        assert filter.grad is not None
        return filter.grad.norm()

    assert slope(found) < 1e-5 * slope(torch.zeros(INPUTS, 3))


def test_a_greater_weight_agrees_more_and_changes_more():
    views = views_of(smooth_images(4), sharpener(0.5))
    filters = [fit(views, weight, "box") for weight in (0.1, 1.0, 10.0)]
    errors = [low_res_error(views, filter) for filter in filters]
    changes = [change(views, filter) for filter in filters]
    assert errors == sorted(errors, reverse=True) and changes == sorted(changes)


@pytest.mark.parametrize("kernel", REACH)
def test_views_larger_than_what_is_held_at_once_are_fitted_as_small_ones(
    monkeypatch, kernel: Kernel
):
    views = views_of(smooth_images(3), sharpener(0.5), kernel)
    whole = fit(views, 10.0, kernel)
    monkeypatch.setattr("cbnerf.codebook.consistency.ROWS", 100)
    torch.testing.assert_close(fit(views, 10.0, kernel), whole)

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cbnerf.downsampling import REACH, Kernel, downsample, spread

every_map = pytest.mark.parametrize(
    "kernel, scale", [(kernel, scale) for kernel in REACH for scale in (1, 2, 3, 4)]
)


def draw_images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
def test_lanczos_is_that_of_pillow_up_to_the_edges(scale: int):
    images = draw_images(1, 2, 5 * scale, 11 * scale).float()
    found = downsample(images, scale, "lanczos")[0]
    for channel, plane in zip(found, images[0], strict=True):
        image = Image.fromarray(plane.numpy(), mode="F")
        wanted = np.array(image.resize((11, 5), Image.Resampling.LANCZOS))
        torch.testing.assert_close(channel, torch.from_numpy(wanted), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_a_box_is_a_mean_of_blocks_and_its_adjoint_spreads_evenly(scale: int):
    images = draw_images(2, 3, 3 * scale, 4 * scale)
    shrunk = downsample(images, scale, "box")
    assert torch.equal(shrunk, F.avg_pool2d(images, scale))
    assert torch.equal(spread(shrunk, scale, "box"), F.interpolate(shrunk, scale_factor=scale))


@every_map
def test_spreading_is_the_adjoint(kernel: Kernel, scale: int):
    """By autograd: the gradient of <downsample(x), y> is the adjoint of y."""
    images = draw_images(2, 3, 4 * scale, 7 * scale).requires_grad_()
    low_res = draw_images(2, 3, 4, 7) - 0.5
    (downsample(images, scale, kernel) * low_res).sum().backward()
    torch.testing.assert_close(spread(low_res, scale, kernel), scale**2 * images.grad)


@every_map
def test_flat_images_stay_flat(kernel: Kernel, scale: int):
    flat = torch.full((1, 1, 9 * scale, 10 * scale), 0.3, dtype=torch.float64)
    torch.testing.assert_close(downsample(flat, scale, kernel), flat[..., :9, :10])
    # Lanczos' phases have not quite the same sum.
    large = spread(flat[..., :9, :10], scale, kernel)
    torch.testing.assert_close(large.mean(), flat.mean())


@every_map
def test_a_pixel_counts_as_far_as_it_is_said_to(kernel: Kernel, scale: int):
    images = draw_images(1, 1, scale, 16 * scale)
    changed = images.clone()
    changed[..., 8 * scale : 9 * scale] += 1
    difference = downsample(changed, scale, kernel) - downsample(images, scale, kernel)
    places = difference[0, 0, 0].abs() > 1e-9
    assert not places[: 8 - REACH[kernel]].any() and not places[9 + REACH[kernel] :].any()
    assert places[8]


@every_map
def test_back_projection_converges(kernel: Kernel, scale: int):
    """Spreading what is missing, again and again, makes images agree with their low-res ones."""
    images, known = torch.zeros(1, 1, 8 * scale, 8 * scale), draw_images(1, 1, 8, 8).float()
    errors = []
    for _ in range(5):
        missing = known - downsample(images, scale, kernel)
        errors.append(float(missing.square().mean()))
        images = images + spread(missing, scale, kernel)
    pairs = zip(errors, errors[1:], strict=False)
    assert all(after <= max(before / 2, 1e-12) for before, after in pairs)

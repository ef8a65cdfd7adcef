from dataclasses import replace

import pytest
import torch

from cbnerf import downsampling
from cbnerf.data.pixels import PixelSampler, downsample, scale_below
from cbnerf.data.scene import Scene
from cbnerf.downsampling import REACH, Kernel
from cbnerf.nerf.rays import make_world_rays
from cbnerf.rng import Rng
from cbnerf.training.field import scene_cameras

CPU = torch.device("cpu")


@pytest.mark.parametrize("scale", [2, 4])
def test_low_res_pixels_are_rounded_means_of_their_box(tiny_scene: Scene, scale: int):
    low_res = downsample(tiny_scene.images, scale, "box")
    assert low_res.dtype == torch.uint8
    assert low_res.shape == (10, 48 // scale, 64 // scale, 3)
    for view, row, column in ((0, 0, 0), (3, 5, 11), (9, 48 // scale - 1, 64 // scale - 1)):
        box = tiny_scene.images[
            view, row * scale : (row + 1) * scale, column * scale : (column + 1) * scale
        ]
        assert torch.equal(low_res[view, row, column], box.double().mean((0, 1)).round().byte())


@pytest.mark.parametrize("kernel", ["box", "lanczos"])
def test_both_kernels_keep_flat_colour_and_place(kernel: Kernel):
    image = torch.full((1, 12, 16, 3), 77, dtype=torch.uint8)
    assert (downsample(image, 2, kernel) == 77).all()
    image[:, :, 8:] = 200
    low_res = downsample(image, 2, kernel)[0, :, :, 0].float()
    assert low_res.shape == (6, 8)
    # The edge is where it was: antisymmetric about the middle.
    torch.testing.assert_close(low_res + low_res.flip(1), torch.full((6, 8), 277.0), atol=1, rtol=0)
    assert low_res[:, 3].max() < 100 and low_res[:, 4].min() > 177


def test_kernels_differ(tiny_scene: Scene):
    box, lanczos = (downsample(tiny_scene.images[:1], 2, k).float() for k in ("box", "lanczos"))
    assert (box - lanczos).abs().max() > 3


@pytest.mark.parametrize("kernel", REACH)
def test_photographs_are_shrunk_by_the_map_that_refiners_heed(tiny_scene: Scene, kernel: Kernel):
    """But for rounding, and for clipping of what Lanczos overshoots."""
    linear = downsampling.downsample(tiny_scene.images.movedim(-1, 1).float(), 2, kernel)
    found = downsample(tiny_scene.images, 2, kernel).movedim(-1, 1)
    difference = (found - linear.clamp(0, 255)).abs()
    assert difference.mean() < 0.3 and difference.max() < 5


def test_scale_one_changes_nothing(tiny_scene: Scene):
    assert torch.equal(downsample(tiny_scene.images, 1, "lanczos"), tiny_scene.images)


def test_a_scale_below_stand_the_low_res_photographs_with_their_rays(tiny_scene: Scene):
    below = scale_below(tiny_scene, "box")
    assert torch.equal(below.images, downsample(tiny_scene.images, 2, "box"))
    assert (below.scale, below.name) == (2, tiny_scene.name)
    # The middle of a low-res pixel is the corner that four high-res pixels share.
    view = torch.tensor([3, 3, 3])
    column, row = torch.tensor([0.5, 7.5, 31.5]), torch.tensor([0.5, 11.5, 23.5])
    rays = make_world_rays(scene_cameras(below, CPU), view, column, row)
    expected = make_world_rays(scene_cameras(tiny_scene, CPU), view, 2 * column, 2 * row)
    torch.testing.assert_close(rays, expected)


@pytest.mark.parametrize("scale, size", [(2, (22, 32)), (4, (8, 16))])
def test_a_scale_below_sides_are_multiples_of_the_scale_again(
    tiny_scene: Scene, scale: int, size: tuple[int, int]
):
    scene = replace(tiny_scene, images=tiny_scene.images[:, :44], scale=scale)
    below = scale_below(scene, "box")
    assert below.images.shape[1:3] == size
    low_res = downsample(scene.images, scale, "box")
    assert torch.equal(below.images, low_res[:, : size[0], : size[1]])


def test_pixels_have_the_colour_of_their_place(tiny_scene: Scene):
    sampler = PixelSampler(tiny_scene, [2, 7, 5], "box", CPU)
    batch = sampler.draw(500, Rng(0, 0, CPU))
    low_res = downsample(tiny_scene.images, 2, "box")
    expected = low_res[batch.views, batch.rows, batch.columns].float() / 255
    torch.testing.assert_close(batch.rgb, expected)


def test_all_pixels_of_the_chosen_views_are_drawn_alike(tiny_scene: Scene):
    batch = PixelSampler(tiny_scene, [2, 7, 5], "box", CPU).draw(30_000, Rng(0, 0, CPU))
    for values, choices in ((batch.views, {2, 7, 5}), (batch.rows, range(24)),
                            (batch.columns, range(32))):  # fmt: skip
        found, counts = values.unique(return_counts=True)
        assert set(found.tolist()) == set(choices)
        expected = 30_000 / len(choices)
        assert (counts - expected).abs().max() < 6 * expected**0.5

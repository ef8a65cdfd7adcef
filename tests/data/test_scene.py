from dataclasses import replace

import pytest
import torch

from cbnerf import downsampling
from cbnerf.config import DataConfig
from cbnerf.data.scene import Capture, Scene, downsample, make_scene, recenter
from cbnerf.downsampling import REACH, Kernel
from cbnerf.nerf.rays import make_world_rays


def move(capture: Capture, rotation: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """The same cameras, told in another frame."""
    poses = torch.cat(
        [capture.camera_to_world[..., :3], capture.camera_to_world[..., 3:] + shift[:, None]], 2
    )
    return rotation @ poses


def test_the_average_camera_becomes_the_identity(tiny_capture: Capture):
    poses = recenter(tiny_capture.camera_to_world)
    right, up, backward, origin = poses.mean(0).unbind(1)
    torch.testing.assert_close(origin, torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(backward / backward.norm(), torch.tensor([0.0, 0.0, 1.0]))
    assert up[0].abs() < 1e-6 and up[1] > 0.9 and right[0] > 0.9
    torch.testing.assert_close(
        poses[:, :, :3].mT @ poses[:, :, :3], torch.eye(3).expand(10, -1, -1)
    )


def test_recentred_poses_do_not_depend_on_the_frame_they_came_in(tiny_capture: Capture):
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    rotation = rotation * torch.linalg.det(rotation)
    moved = move(tiny_capture, rotation, torch.tensor([3.0, -2.0, 7.0]))
    expected = recenter(tiny_capture.camera_to_world)
    torch.testing.assert_close(recenter(moved), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(recenter(expected), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("unit", [1.0, 250.0])
def test_nearest_content_lies_at_four_thirds_in_any_unit(
    tiny_capture: Capture, tiny_scene: Scene, unit: float
):
    poses = tiny_capture.camera_to_world.clone()
    poses[..., 3] *= unit
    capture = tiny_capture._replace(camera_to_world=poses, bounds=tiny_capture.bounds * unit)
    scene = make_scene(capture, DataConfig(width=64))
    shrunk = scene.camera_to_world[..., 3].norm() / recenter(poses)[..., 3].norm()
    assert float(capture.bounds.min() * shrunk) == pytest.approx(4 / 3)
    torch.testing.assert_close(scene.camera_to_world, tiny_scene.camera_to_world)


def test_cropping_keeps_the_principal_point_and_the_top_left_pixels(tiny_capture: Capture):
    scene = make_scene(tiny_capture, DataConfig(width=64, scale=5))
    assert (scene.width, scene.height) == (60, 45)
    assert torch.equal(scene.intrinsics, tiny_capture.intrinsics)
    assert torch.equal(scene.images, tiny_capture.images[:, :45, :60])


def test_a_capture_is_not_changed(tiny_capture: Capture):
    before = tiny_capture.camera_to_world.clone()
    make_scene(tiny_capture, DataConfig(width=64))
    assert torch.equal(tiny_capture.camera_to_world, before)


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
def test_photographs_are_shrunk_by_the_kernel_of_the_refiners(tiny_scene: Scene, kernel: Kernel):
    """But for rounding, and for clipping of what Lanczos overshoots."""
    linear = downsampling.downsample(tiny_scene.images.movedim(-1, 1).float(), 2, kernel)
    found = downsample(tiny_scene.images, 2, kernel).movedim(-1, 1)
    difference = (found - linear.clamp(0, 255)).abs()
    assert difference.mean() < 0.3 and difference.max() < 5


def test_scale_one_changes_nothing(tiny_scene: Scene):
    assert torch.equal(downsample(tiny_scene.images, 1, "lanczos"), tiny_scene.images)


def test_one_scale_below_a_scene_has_its_low_res_photographs_and_their_rays(tiny_scene: Scene):
    below = tiny_scene.scale_below("box")
    assert torch.equal(below.images, downsample(tiny_scene.images, 2, "box"))
    assert (below.scale, below.name) == (2, tiny_scene.name)
    # The middle of a low-res pixel is the corner that four high-res pixels share.
    view = torch.tensor([3, 3, 3])
    column, row = torch.tensor([0.5, 7.5, 31.5]), torch.tensor([0.5, 11.5, 23.5])
    rays = make_world_rays(below.cameras(), view, column, row)
    expected = make_world_rays(tiny_scene.cameras(), view, 2 * column, 2 * row)
    torch.testing.assert_close(rays, expected)


@pytest.mark.parametrize("scale, size", [(2, (22, 32)), (4, (8, 16))])
def test_a_scale_below_sides_are_multiples_of_the_scale_again(
    tiny_scene: Scene, scale: int, size: tuple[int, int]
):
    scene = replace(tiny_scene, images=tiny_scene.images[:, :44], scale=scale)
    below = scene.scale_below("box")
    assert below.images.shape[1:3] == size
    low_res = scene.low_res("box")
    assert torch.equal(below.images, low_res[:, : size[0], : size[1]])

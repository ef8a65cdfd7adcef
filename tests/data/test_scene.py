import pytest
import torch

from cbnerf.config import DataConfig
from cbnerf.data.scene import Capture, Scene, make_scene, recenter


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
    assert scene.center == (32, 24)
    assert scene.focal == tiny_capture.focal
    assert torch.equal(scene.images, tiny_capture.images[:, :45, :60])


def test_a_capture_is_not_changed(tiny_capture: Capture):
    before = tiny_capture.camera_to_world.clone()
    make_scene(tiny_capture, DataConfig(width=64))
    assert torch.equal(tiny_capture.camera_to_world, before)

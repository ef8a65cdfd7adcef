import pytest
import torch

from cbnerf.nerf.path import spiral_path
from cbnerf.nerf.rays import Cameras


@pytest.fixture
def path(tiny_cameras: Cameras) -> Cameras:
    return spiral_path(tiny_cameras, 12, focus_depth=3.5)


def test_all_frames_look_at_the_focus(path: Cameras):
    rotations, origins = path.camera_to_world[..., :3], path.camera_to_world[..., 3]
    focus = torch.tensor([0.0, 0.0, -3.5])
    x, y, z = ((focus - origins)[:, None] @ rotations)[:, 0].unbind(-1)
    assert (z < -3).all()
    torch.testing.assert_close(torch.stack([x, y]), torch.zeros(2, 12), atol=1e-5, rtol=0)


def test_poses_are_rotations_and_upright(path: Cameras):
    rotations = path.camera_to_world[..., :3]
    torch.testing.assert_close(rotations @ rotations.mT, torch.eye(3).expand(12, -1, -1))
    assert (torch.linalg.det(rotations) > 0).all()
    assert (rotations[:, 1, 1] > 0.9).all()
    assert rotations[:, 1, 0].abs().max() < 1e-6


def test_the_path_stays_among_the_photographs(path: Cameras, tiny_cameras: Cameras):
    reach = tiny_cameras.camera_to_world[..., 3].abs().amax(0)
    positions = path.camera_to_world[..., 3]
    assert (positions.abs() <= reach).all()
    assert positions[:, :2].std(0).min() > 0.1 * reach[:2].min()


def test_the_turn_closes(path: Cameras):
    positions = path.camera_to_world[..., 3]
    steps = (positions - positions.roll(1, 0)).norm(dim=1)
    assert 0 < steps[0] < 1.5 * steps[1:].max()
    torch.testing.assert_close(positions.mean(0), torch.zeros(3), atol=1e-6, rtol=0)

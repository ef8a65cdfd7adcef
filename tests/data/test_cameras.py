import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cbnerf.data.cameras import MAX_ANGLE, Registration, check_registration
from cbnerf.data.lenses import Lens
from cbnerf.data.scene import recenter
from cbnerf.nerf.rays import make_cameras, make_world_rays
from cbnerf.scenes import place_cameras

FILE = Path("scene/poses_bounds.npy")
SIZE = (48.0, 64.0)


def turned(degrees: list[float], roll: float = 0.0) -> np.ndarray:
    """Cameras in one place, turned to the side by these angles, then about their own axes."""
    poses = np.zeros((len(degrees), 3, 4))
    for pose, angle in zip(poses, np.radians(degrees), strict=True):
        side = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
        own = [[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0], [0, 0, 1]]
        pose[:, :3] = np.array(side) @ own
    return poses


def registered(
    poses: np.ndarray, half_diagonal: float = 30.0, middle: tuple[float, float] = (32, 24)
) -> Registration:
    """With a lens whose corners stand this many degrees off the middle of the image."""
    focal = math.hypot(*SIZE) / 2 / math.tan(math.radians(half_diagonal))
    lens, views = Lens(64, 48, focal, focal, *middle), len(poses)
    return Registration([FILE], None, poses, [lens] * views, np.tile([1.0, 2.0], (views, 1)))


def test_a_ring_is_refused_with_the_angle_of_the_worst_camera():
    # Their average stands atan(sin 80 / (4 + cos 80)) = 13.3 degrees to the side.
    with pytest.raises(
        ValueError, match=r"row 4 \(counted from 0\) looks 67 degrees beside"
    ) as one:
        check_registration(registered(turned([0, 0, 0, 0, 80])))
    assert str(one.value).startswith(f"{FILE}: ") and "within 75 degrees" in str(one.value)
    with pytest.raises(ValueError, match="looks 90 degrees beside"):  # no average at all
        check_registration(registered(turned([0, 90, 180, 270])))


@pytest.mark.parametrize("roll", [0.0, 0.7, math.pi / 2])
def test_the_limit_is_what_the_corners_of_photographs_see(roll: float):
    """A camera alone is its own average: its field of view decides."""
    check_registration(registered(turned([0, 0], roll), MAX_ANGLE - 0.1))
    with pytest.raises(ValueError, match="row 0 .* looks 0 degrees .* as far as 76;"):
        check_registration(registered(turned([0, 0], roll), MAX_ANGLE + 0.1))


def test_a_principal_point_off_the_middle_counts():
    """With the axis in a corner, the opposite one is twice as far off: at atan(2 tan 60)."""
    check_registration(registered(turned([0, 0]), 60, middle=(0, 0)))
    for middle in ((-8, -6), (72, 54)):
        with pytest.raises(ValueError, match="row 0 .* as far as 76;"):
            check_registration(registered(turned([0, 0]), 60, middle))


def test_within_the_limit_every_ray_goes_ahead():
    """NDC needs that: with d_z >= 0 in the average frame a ray has no end at infinity."""
    angles = [-33.0, 0.0, 33.0]
    poses = turned(angles)
    checked = registered(poses, 40)
    check_registration(checked)
    intrinsics = torch.from_numpy(np.stack([lens.matrix for lens in checked.lenses]))
    cameras = make_cameras(recenter(torch.from_numpy(poses)), intrinsics, (48, 64))
    views, u, v = torch.meshgrid(
        torch.arange(3.0), torch.linspace(0, 64, 9), torch.linspace(0, 48, 9), indexing="ij"
    )
    rays = make_world_rays(cameras, views.long(), u, v)
    directions = torch.nn.functional.normalize(rays.directions, dim=-1)
    assert directions[..., 2].max() <= -math.cos(math.radians(MAX_ANGLE))


def test_built_in_scenes_are_far_from_the_limit():
    poses = place_cameras(13).double().numpy()
    with pytest.raises(ValueError):  # with a lens twice as wide they are not
        check_registration(registered(poses, 70))
    check_registration(registered(poses, 55))


def test_cameras_turned_about_their_axes_by_all_angles_have_a_frame():
    """Their "up" averages to nothing, as of a drone that looks down and turns."""
    quarter = np.concatenate([turned([0], turn * math.pi / 2) for turn in range(4)])
    frame = recenter(torch.from_numpy(quarter))[:, :, :3]
    torch.testing.assert_close(frame.mT @ frame, torch.eye(3).expand(4, 3, 3))
    torch.testing.assert_close(frame[:, :, 2], torch.tensor([[0.0, 0.0, 1.0]]).expand(4, 3))


def test_rounded_rotations_pass():
    poses = place_cameras(13).double().numpy()
    for rounded in (poses.astype(np.float32).astype(float), poses.round(5)):
        check_registration(registered(rounded))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r * [-1, 1, 1], "mirrors space"),
        (lambda r: -r, "mirrors space"),
        (lambda r: r * 1.001, "no rotation: its axes have lengths 1, 1, 1, or"),
        (lambda r: r * 0.5, "no rotation: its axes have lengths 0.5, 0.5, 0.5"),
        (lambda r: r * 0, "no rotation: its axes have lengths 0, 0, 0"),
        (lambda r: r + [[0, 0.1, 0]] * 3, "no rotation"),
    ],
)
def test_what_is_no_rotation_is_refused_with_its_row(change, message: str):
    poses = turned([0, 10, 20])
    poses[1, :, :3] = change(poses[1, :, :3])
    with pytest.raises(
        ValueError, match=rf"the pose of row 1 \(counted from 0\) .*{message}"
    ) as one:
        check_registration(registered(poses))
    assert str(one.value).startswith(f"{FILE}: ")

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cbnerf.data.cameras import MAX_ANGLE, check_forward_facing, check_rotations
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


def lens(half_diagonal: float, views: int, middle: tuple[float, float] = (32, 24)) -> np.ndarray:
    """Of an image whose corners stand this many degrees off its middle, cropped to SIZE."""
    focal = math.hypot(*SIZE) / 2 / math.tan(math.radians(half_diagonal))
    return np.tile([focal, focal, *middle], (views, 1))


def test_a_ring_is_refused_with_the_angle_of_the_worst_camera():
    # Their average stands atan(sin 80 / (4 + cos 80)) = 13.3 degrees to the side.
    with pytest.raises(
        ValueError, match=r"row 4 \(counted from 0\) looks 67 degrees beside"
    ) as one:
        check_forward_facing(turned([0, 0, 0, 0, 80]), lens(33.7, 5), SIZE, FILE)
    assert str(one.value).startswith(f"{FILE}: ") and "within 75 degrees" in str(one.value)
    with pytest.raises(ValueError, match="looks 90 degrees beside"):  # no average at all
        check_forward_facing(turned([0, 90, 180, 270]), lens(33.7, 4), SIZE, FILE)


@pytest.mark.parametrize("roll", [0.0, 0.7, math.pi / 2])
def test_the_limit_is_what_the_corners_of_photographs_see(roll: float):
    """A camera alone is its own average: its field of view decides."""
    check_forward_facing(turned([0, 0], roll), lens(MAX_ANGLE - 0.1, 2), SIZE, FILE)
    with pytest.raises(ValueError, match="row 0 .* looks 0 degrees .* as far as 76;"):
        check_forward_facing(turned([0, 0], roll), lens(MAX_ANGLE + 0.1, 2), SIZE, FILE)


def test_a_principal_point_off_the_middle_counts():
    narrow = lens(60, 2, middle=(0, 0))  # the far corner is twice as far off, at 73.9 degrees
    check_forward_facing(turned([0, 0]), narrow, SIZE, FILE)
    for views, middle in ((2, (-10, 0)), (2, (74, 48))):
        with pytest.raises(ValueError, match="row 0 .* as far as 7[56];"):
            check_forward_facing(turned([0, 0]), lens(60, views, middle), SIZE, FILE)


def test_within_the_limit_every_ray_goes_ahead():
    """NDC needs that: with d_z >= 0 in the average frame a ray has no end at infinity."""
    angles, intrinsics = [-33.0, 0.0, 33.0], lens(40, 3)
    poses = turned(angles)
    check_forward_facing(poses, intrinsics, SIZE, FILE)
    cameras = make_cameras(recenter(torch.from_numpy(poses)), torch.tensor(intrinsics), (48, 64))
    views, u, v = torch.meshgrid(
        torch.arange(3.0), torch.linspace(0, 64, 9), torch.linspace(0, 48, 9), indexing="ij"
    )
    rays = make_world_rays(cameras, views.long(), u, v)
    directions = torch.nn.functional.normalize(rays.directions, dim=-1)
    assert directions[..., 2].max() <= -math.cos(math.radians(MAX_ANGLE))


def test_built_in_scenes_are_far_from_the_limit():
    poses = place_cameras(13).double().numpy()
    check_rotations(poses[:, :, :3], FILE)
    with pytest.raises(ValueError):  # with a lens twice as wide they are not
        check_forward_facing(poses, lens(70, 13), SIZE, FILE)
    check_forward_facing(poses, lens(55, 13), SIZE, FILE)


def test_cameras_turned_about_their_axes_by_all_angles_have_a_frame():
    """Their "up" averages to nothing, as of a drone that looks down and turns."""
    quarter = np.concatenate([turned([0], turn * math.pi / 2) for turn in range(4)])
    frame = recenter(torch.from_numpy(quarter))[:, :, :3]
    torch.testing.assert_close(frame.mT @ frame, torch.eye(3).expand(4, 3, 3))
    torch.testing.assert_close(frame[:, :, 2], torch.tensor([[0.0, 0.0, 1.0]]).expand(4, 3))


def test_rounded_rotations_pass():
    rotations = place_cameras(13).double().numpy()[:, :, :3]
    for rounded in (rotations.astype(np.float32).astype(float), rotations.round(5)):
        check_rotations(rounded, FILE)


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
    rotations = turned([0, 10, 20])[:, :, :3]
    rotations[1] = change(rotations[1])
    with pytest.raises(
        ValueError, match=rf"the pose of row 1 \(counted from 0\) .*{message}"
    ) as one:
        check_rotations(rotations, FILE)
    assert str(one.value).startswith(f"{FILE}: ")

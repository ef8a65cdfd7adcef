import math

import pytest
import torch
from torch import Tensor

from cbnerf.nerf import rays
from cbnerf.nerf.rays import Cameras, make_rays, make_world_rays
from cbnerf.nerf.warp import (
    find_positions,
    find_visible,
    follow_pixels,
    sample,
    warping_error,
)

HEIGHT, WIDTH = 24, 32


def make_cameras(*positions: tuple[float, float, float], turn: float = 0.0) -> Cameras:
    """Cameras at these positions, each turned by `turn` radians more about the vertical axis."""
    poses = []
    for number, position in enumerate(positions):
        cos, sin = math.cos(turn * number), math.sin(turn * number)
        rotation = torch.tensor([[cos, 0.0, sin], [0.0, 1.0, 0.0], [-sin, 0.0, cos]])
        poses.append(torch.cat([rotation, torch.tensor(position)[:, None]], dim=1))
    intrinsics = torch.tensor([40.0, 40.0, 15.0, 11.0]).repeat(len(poses), 1)
    return rays.make_cameras(torch.stack(poses), intrinsics, (HEIGHT, WIDTH))


def see(cameras: Cameras, view: int, z: Tensor) -> Tensor:
    """World points on the planes `z`, one per pixel."""
    v, u = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    rays = make_world_rays(cameras, torch.full(u.shape, view), u, v)
    along = (z - rays.origins[..., 2]) / rays.directions[..., 2]
    return rays.origins + along[..., None] * rays.directions


def paint(points: Tensor) -> Tensor:
    """Colours that depend on the place only; linear, so that interpolation makes no error."""
    x, y, z = points.unbind(-1)
    return torch.stack([0.5 + 0.1 * x, 0.5 + 0.1 * y, 0.5 + 0.1 * (x - y) + 0.02 * z], dim=-1)


MOVING = [(0.0, 0.0, 0.0), (0.2, 0.1, 0.0), (0.3, -0.1, 0.3)]


def test_a_plane_seen_by_a_moving_camera_has_no_warping_error():
    cameras = make_cameras(*MOVING)
    plane = torch.full((HEIGHT, WIDTH), -4.0)
    frames = torch.stack([paint(see(cameras, view, plane)) for view in range(3)])
    depth = torch.full((3, HEIGHT, WIDTH), 1 - 1 / 4)
    result = warping_error(frames, depth, cameras)
    assert result.error < 1e-6
    assert 0.7 < result.seen < 1
    # The measure sees what is wrong: another depth, and colours that flicker.
    assert warping_error(frames, depth - 0.2, cameras).error > 1e-3
    flickering = frames + torch.tensor([0.0, 0.05, 0.0])[:, None, None, None]
    assert warping_error(flickering, depth, cameras).error == pytest.approx(0.05, abs=1e-4)


def test_turning_the_camera_hardly_adds_to_it():
    cameras = make_cameras(*MOVING, turn=0.05)
    plane = torch.full((HEIGHT, WIDTH), -4.0)
    frames = torch.stack([paint(see(cameras, view, plane)) for view in range(3)])
    depth = torch.full((3, HEIGHT, WIDTH), 1 - 1 / 4)
    # Colours are no longer linear in the pixels.
    assert warping_error(frames, depth, cameras).error < 1e-4


def test_points_lie_where_the_other_camera_sees_them():
    cameras = make_cameras(*MOVING, turn=0.1)
    z = -2 - 3 * torch.rand(HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    seen = follow_pixels(cameras, 1 + 1 / z, 0, 2)
    u, v = seen.unbind(-1)
    rays = make_rays(cameras, torch.full(u.shape, 2), u, v)
    # Back along the NDC rays of the other camera, to the same t.
    there = rays.origins + (1 + 1 / z)[..., None] * rays.directions
    v, u = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    own = make_rays(cameras, torch.zeros(u.shape, dtype=torch.int64), u, v)
    here = own.origins + (1 + 1 / z)[..., None] * own.directions
    torch.testing.assert_close(there, here, atol=1e-4, rtol=1e-4)


def test_what_something_nearer_hides_is_left_out():
    cameras = make_cameras((0.0, 0.0, 0.0), (0.4, 0.0, 0.0))
    # A post 4 to 12 pixels into the first view, at depth 2 before a wall at depth 8.
    z = torch.full((2, HEIGHT, WIDTH), -8.0)
    z[0, :, 12:20] = -2.0
    z[1, :, 4:12] = -2.0  # 40 * 0.4 / 2 = 8 pixels to the left
    frames = torch.where((z == -2)[..., None], torch.tensor(1.0), torch.tensor(0.0)).expand(
        -1, -1, -1, 3
    )
    depth = 1 + 1 / z
    points = follow_pixels(cameras, depth[0], 0, 1)
    visible = find_visible(points, depth[0], depth[1])
    # The wall moves 2 pixels: columns 6 to 13 go behind the post, 0 and 1 out of the image.
    assert visible[:, 12:20].all() and not visible[:, 6:12].any() and not visible[:, :2].any()
    assert visible[:, 2:6].all() and visible[:, 20:].all()
    assert warping_error(frames, depth, cameras).error < 1e-6
    flat = torch.full_like(depth, 1 - 1 / 8)
    assert warping_error(frames, flat, cameras).error > 0.05


def test_sampling_at_pixel_centres_gives_the_pixels():
    image = torch.rand(3, 5, 2)
    v, u = torch.meshgrid(torch.arange(3) + 0.5, torch.arange(5) + 0.5, indexing="ij")
    torch.testing.assert_close(sample(image, torch.stack([u, v], dim=-1)), image)
    between = sample(image, torch.tensor([[2.0, 1.5]]))
    torch.testing.assert_close(between[0], (image[1, 1] + image[1, 2]) / 2)


def test_without_a_common_pixel_there_is_no_error_to_tell():
    cameras = make_cameras((0.0, 0.0, 0.0), (90.0, 0.0, 0.0))
    result = warping_error(torch.rand(2, HEIGHT, WIDTH, 3), torch.zeros(2, HEIGHT, WIDTH), cameras)
    assert math.isnan(result.error) and result.seen == 0


def test_content_behind_the_next_camera_is_not_seen():
    cameras = make_cameras((0.0, 0.0, 0.0), (0.0, 0.0, -5.0))
    depth = torch.full((HEIGHT, WIDTH), 1 - 1 / 3)
    points = follow_pixels(cameras, depth, 0, 1)
    assert points.isnan().all()
    assert not find_visible(points, depth, depth).any()


def test_positions_are_normalised_device_coordinates():
    cameras = make_cameras((0.0, 0.0, 0.0))
    t = torch.rand(HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    x, y, depth = find_positions(cameras, t, 0).unbind(-1)
    # Seen from the origin, x and y do not depend on depth: the image spans [-1, 1].
    u = (torch.arange(WIDTH) + 0.5) * 2 / WIDTH - 1
    v = 1 - (torch.arange(HEIGHT) + 0.5) * 2 / HEIGHT
    torch.testing.assert_close(x, u.expand(HEIGHT, -1))
    torch.testing.assert_close(y, v[:, None].expand(-1, WIDTH))
    assert torch.equal(depth, t)


def test_positions_from_elsewhere_in_closed_form():
    cameras = make_cameras((0.3, -0.2, 0.5))
    x, y, _ = find_positions(cameras, torch.full((HEIGHT, WIDTH), 0.75), 0)[4, 7].tolist()
    # The plane z = -4 is 4.5 before the camera.
    # The average camera sees its own axis at (15, 11) in an image of 32 x 24.
    shift_x, shift_y = 15 / 16 - 1, 1 - 11 / 12
    assert x == pytest.approx(80 / WIDTH * (0.3 + 4.5 * (7.5 - 15) / 40) / 4 + shift_x, abs=1e-5)
    assert y == pytest.approx(80 / HEIGHT * (-0.2 + 4.5 * (11 - 4.5) / 40) / 4 + shift_y, abs=1e-5)


def test_a_scene_point_has_one_position_whichever_camera_sees_it():
    cameras = make_cameras(*MOVING, turn=0.1)
    t = torch.full((HEIGHT, WIDTH), 0.75)  # the plane z = -4
    here, there = (find_positions(cameras, t, view) for view in (0, 2))
    seen = follow_pixels(cameras, t, 0, 2)
    inside = find_visible(seen, t, t)
    assert inside.float().mean() > 0.3
    # Positions on a plane are not linear in pixels where the camera is turned: 32 pixels span 2.
    torch.testing.assert_close(sample(there, seen)[inside], here[inside], atol=1e-3, rtol=0)
    assert (there - here)[inside].abs().amax(0)[:2].min() > 0.05


def test_positions_at_infinity_are_finite():
    positions = find_positions(make_cameras(*MOVING), torch.ones(HEIGHT, WIDTH), 1)
    assert positions.half().isfinite().all() and positions.abs().max() < 2

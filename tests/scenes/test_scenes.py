"""Built-in scenes: their depth predicts one view from another, and they are hard enough."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cbnerf.config import DataConfig
from cbnerf.data.library import make_capture
from cbnerf.data.splits import split_views
from cbnerf.scenes import BUILT_IN_SCENES, make_camera, make_world, place_cameras
from cbnerf.scenes.raycasting import Camera, View, World, place, render
from cbnerf.scenes.shapes import Ball, Box, Card, Relief, Tube
from cbnerf.scenes.textures import mottle

world_of = cache(make_world)
every_scene = pytest.mark.parametrize("name", BUILT_IN_SCENES)


@cache
def photograph(name: str, view: int, width: int) -> tuple[Camera, View]:
    camera = make_camera(place_cameras(12)[view], width)
    return camera, render(world_of(name), camera, 4)


def blur(rgb: Tensor) -> Tensor:
    return F.avg_pool2d(rgb.permute(2, 0, 1)[None], 3, 1, 1)


def reproject_error(here: tuple[Camera, View], there: tuple[Camera, View], stretch: float) -> float:
    """Median colour difference between a view and another one, seen through the first's depth."""
    camera, view = here
    x, y = camera.slopes()
    ray = torch.stack([x.expand(camera.height, -1), y[:, None].expand(-1, camera.width)])
    ray = torch.cat([ray, -torch.ones(1, camera.height, camera.width)]).flatten(1)
    points = camera.pose[:, :3] @ (ray * stretch * view.depth.flatten()) + camera.pose[:, 3:]

    other, seen = there
    column, row, depth = other.project(points)
    grid = torch.stack([2 * column / other.width - 1, 2 * row / other.height - 1], -1)[None, None]
    source = torch.cat([blur(seen.rgb), seen.depth[None, None]], 1)
    sampled = F.grid_sample(source, grid, align_corners=False)[0, :, 0]
    highest = F.max_pool2d(view.depth[None], 3, 1, 1).flatten()
    lowest = -F.max_pool2d(-view.depth[None], 3, 1, 1).flatten()
    usable = (highest < 1.03 * lowest) & (grid.abs() < 0.97).all(-1).flatten()
    if stretch == 1:
        usable &= (sampled[3] / depth - 1).abs() < 0.01
        assert usable.float().mean() > 0.05
    return float((sampled[:3] - blur(view.rgb).flatten(2)[0])[:, usable].abs().median())


@every_scene
def test_depth_of_one_view_predicts_another(name):
    here, there = photograph(name, 4, 128), photograph(name, 5, 128)
    assert reproject_error(here, there, 1.0) < 0.02
    assert reproject_error(here, there, 1.15) > 2 * reproject_error(here, there, 1.0)


@every_scene
def test_bounds_enclose_the_depth_of_every_ray(name):
    capture = make_capture(name, width=48, num_views=2)
    for view in range(2):
        camera = make_camera(capture.camera_to_world[view], 48)
        depth = render(world_of(name), camera.refine(5), 1).depth
        near, far = capture.bounds[view].tolist()
        assert near < depth.min() and depth.max() < far
        assert 0.9 < near / depth.min() and far / depth.max() < 1.1
        assert far / near > 1.5


@every_scene
def test_resolution_changes_sharpness_not_content(name):
    _, fine = photograph(name, 4, 128)
    _, coarse = photograph(name, 4, 64)
    shrunk = F.avg_pool2d(fine.rgb.permute(2, 0, 1), 2).permute(1, 2, 0)
    assert (shrunk - coarse.rgb).square().mean().sqrt() < 0.04


@every_scene
def test_texture_is_neither_smooth_nor_noise(name):
    _, view = photograph(name, 5, 128)
    rgb = view.rgb.permute(2, 0, 1)[None]
    half = F.avg_pool2d(rgb, 2)
    back = F.interpolate(half, scale_factor=2, mode="bicubic", align_corners=False)
    psnr = -10 * torch.log10((back.clamp(0, 1) - rgb).square().mean())
    assert 22 < psnr < 33


@every_scene
def test_neighbouring_views_differ(name):
    (_, here), (_, there) = photograph(name, 4, 128), photograph(name, 5, 128)
    assert (here.rgb - there.rgb).abs().mean() > 0.03


def test_equal_calls_give_equal_bits():
    torch.manual_seed(1)
    first = make_capture("thicket", width=48, num_views=2)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    second = make_capture("thicket", width=48, num_views=2)
    assert all(torch.equal(a, b) for a, b in zip(first[1:3], second[1:3], strict=True))
    assert torch.equal(first.bounds, second.bounds)
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())


def test_capture_has_the_shapes_and_names_it_promises():
    assert len(BUILT_IN_SCENES) == 8 and list(BUILT_IN_SCENES) == sorted(BUILT_IN_SCENES)
    capture = make_capture("blinds", width=50, num_views=3)
    assert capture.images.shape == (3, 38, 50, 3) and capture.images.dtype == torch.uint8
    assert capture.camera_to_world.dtype == capture.bounds.dtype == torch.float32
    assert capture.name == "blinds" and capture.bounds.shape == (3, 2)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="atlantis.*arcade.*thicket"):
        make_capture("atlantis", width=48)


@pytest.mark.parametrize("num_views", [1, 2, 5, 12, 20, 40])
def test_poses_are_rigid(num_views):
    rotations = place_cameras(num_views)[:, :, :3]
    torch.testing.assert_close(
        rotations.mT @ rotations, torch.eye(3).expand(num_views, 3, 3), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(num_views))


@pytest.mark.parametrize("num_views", [10, 12, 16, 20, 24, 32, 40, 60])
def test_training_views_surround_those_held_out(num_views):
    split = split_views(num_views, DataConfig())
    places = place_cameras(num_views)[:, :2, 3]
    angles = torch.linspace(0, 2 * torch.pi, 180)
    along = places @ torch.stack([angles.cos(), angles.sin()])
    # Inside the convex hull: in no direction farther out than every training view.
    assert (along[split.val + split.test].amax(0) < along[split.train].amax(0)).all()


FACE_ON = Camera(torch.eye(3, 4), focal=40.0, width=41, height=31)


@pytest.mark.parametrize(
    "shape, depth",
    [
        (Card(), 5),
        (Box(), 4.5),
        (Ball(), 4.5),
        (Tube(), 4.5),
        (Relief(lambda x, y: 0.5 + 0 * x), 4.75),
        (Card(cut=lambda x, y: x > 2), 9),
    ],
)
def test_shape_is_hit_at_its_front(shape, depth):
    paint = mottle("000000", "ffffff")
    solids = [
        place(shape, paint, (0, 0, -5), (1, 1, 0.5)),
        place(Card(), paint, (0, 0, -9), (9, 9, 1)),
    ]
    view = render(World(solids, FACE_ON, torch.full((31, 41), 99.0)), FACE_ON, 1)
    assert float(view.depth[15, 20]) == pytest.approx(depth, abs=1e-4)
    assert float(view.depth[0, 0]) == pytest.approx(9, abs=1e-4)


def test_ray_that_leaves_a_tube_sees_its_inside():
    tube = place(Tube(), mottle("000000", "ffffff"), (0, 0, -5), (1, 1, 1), (0, 90, 0))
    wall = place(Card(), mottle("000000", "ffffff"), (0, 0, -9), (9, 9, 1))
    view = render(World([tube, wall], FACE_ON, torch.full((31, 41), 99.0)), FACE_ON, 1)
    assert float(view.depth[15, 20]) == pytest.approx(9, abs=1e-4)
    # Slope 9 / 40 meets radius 1 at depth 40 / 9.
    assert float(view.depth[15, 29]) == pytest.approx(40 / 9, abs=1e-4)


def test_lamp_casts_a_shadow():
    world = world_of("mosaic")
    lit = World(world.solids, world.lamp, torch.full_like(world.lamp_depth, 99.0))
    camera = make_camera(place_cameras(12)[0], 48)
    change = render(lit, camera, 1).rgb - render(world, camera, 1).rgb
    assert change.min() > -1e-6 and change.max() > 0.2

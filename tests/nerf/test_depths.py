import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cbnerf.nerf.depths import NUM_KNOTS, PlaneSpace, concentrate, spread_over_bounds, to_t
from cbnerf.nerf.rays import Cameras, make_rays

EVEN = torch.linspace(0, 1, NUM_KNOTS)
weights = st.lists(st.floats(0, 1), min_size=4, max_size=40).filter(lambda w: sum(w) > 1e-3)


def test_t_is_linear_between_knots():
    knots = torch.tensor([0, 0.8, 1])
    s = torch.tensor([[0, 0.25, 0.5, 0.75, 1]])
    torch.testing.assert_close(to_t(knots, s), torch.tensor([[0, 0.4, 0.8, 0.9, 1]]))
    torch.testing.assert_close(to_t(EVEN, s), s)


def test_bounds_that_agree_spread_s_evenly_in_disparity():
    torch.testing.assert_close(spread_over_bounds(torch.full((9,), 3.0)), EVEN)


def test_a_view_whose_bound_is_far_too_near_has_one_vote():
    nears = torch.tensor([1e-3, *[1.0] * 9])
    knots = spread_over_bounds(nears)
    inside = (knots >= 0.999).float().mean()
    assert inside == pytest.approx(0.9, abs=0.02)


@given(weights)
def test_knots_increase_from_0_to_1(weights: list[float]):
    knots = concentrate(concentrate(EVEN, torch.tensor(weights)), torch.tensor(weights))
    assert knots[0] == 0 and knots[-1] == 1
    assert (knots.diff() > 0).all()


def test_even_weights_change_nothing():
    torch.testing.assert_close(concentrate(EVEN, torch.full((32,), 0.03)), EVEN)


def test_content_gets_most_of_s_and_no_depth_is_lost():
    weights = torch.zeros(32)
    weights[24:28] = 0.25  # t between .75 and .875
    knots = concentrate(EVEN, weights)
    inside = ((knots >= 0.72) & (knots <= 0.91)).float().mean()
    assert inside > 0.85
    assert knots.diff().max() < 0.35  # the empty front still has knots


@pytest.mark.parametrize("factor", [2.0, 1000.0])
def test_directions_stay_small_with_a_near_plane_that_is_too_near(
    factor: float, tiny_cameras: Cameras
):
    """Scenes are scaled by their near plane."""
    poses = tiny_cameras.camera_to_world.clone()
    poses[..., 3] *= factor
    scaled = tiny_cameras._replace(camera_to_world=poses)
    views = torch.arange(10)
    u, v = torch.linspace(0, 60, 10), torch.linspace(40, 0, 10)
    here, there = (
        PlaneSpace(cameras, EVEN).directions(make_rays(cameras, views, u, v))[:, :2]
        for cameras in (tiny_cameras, scaled)
    )
    assert there.abs().max() < 2
    growth = (there * here).sum(0) / here.square().sum(0)  # equal for all rays
    torch.testing.assert_close(there, growth * here, atol=1e-3, rtol=1e-3)


def test_what_the_cameras_see_fills_the_planes_at_every_depth(tiny_cameras: Cameras):
    height, width = tiny_cameras.size
    views = torch.arange(len(tiny_cameras.camera_to_world)).repeat_interleave(4)
    corners = torch.tensor([[0.0, 0.0], [width, 0.0], [0.0, height], [width, height]])
    u, v = corners.repeat(len(tiny_cameras.camera_to_world), 1).unbind(1)
    s = torch.tensor([0.0, 0.5, 1.0]).expand(len(views), -1)
    knots = concentrate(EVEN, torch.linspace(0, 1, 32))
    rays = make_rays(tiny_cameras, views, u, v)
    reached = PlaneSpace(tiny_cameras, knots).points(rays, s).abs().amax(0)
    assert reached.max() <= 1 + 1e-5
    torch.testing.assert_close(reached[[0, 2]], torch.ones(2, 3))
    torch.testing.assert_close(reached[1, 2], torch.tensor(0.0))

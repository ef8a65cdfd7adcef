from dataclasses import replace

import pytest
import torch

from cbnerf.config import Config
from cbnerf.data.library import make_capture
from cbnerf.data.pixels import PixelSampler
from cbnerf.data.scene import make_scene
from cbnerf.nerf.depths import spread_over_bounds
from cbnerf.overrides import with_overrides
from cbnerf.training.depths import find_depths
from cbnerf.training.field import low_res_cameras

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> Config:
    return with_overrides(
        tiny_config, {"field.planes.depth_steps": 40, "field.optim.batch_size": 256}
    )


def find(config: Config, near: float, *, only_one: bool = False) -> torch.Tensor:
    """Depths of the knots, in units of the true near plane, where bounds are too near by a
    factor."""
    capture = make_capture("mosaic", width=64, num_views=10)
    bounds = capture.bounds.clone()
    bounds[: 1 if only_one else None, 0] /= near
    scene = make_scene(capture._replace(bounds=bounds), config.data)
    cameras = low_res_cameras(scene.cameras(), scene.scale)
    pixels = PixelSampler(scene, list(range(scene.num_views)), "box", CPU)
    knots = find_depths(config, cameras, spread_over_bounds(scene.nears), pixels, CPU)
    return 1 / (1 - knots[:-1].double()) / near


@pytest.mark.parametrize(("near", "only_one"), [(1, False), (5, False), (1000, True)])
def test_most_cells_lie_where_content_is(config: Config, near: float, only_one: bool):
    depths = find(config, near, only_one=only_one)
    assert (depths > 0.75).double().mean() > 0.6


def test_without_steps_the_bounds_are_trusted(config: Config):
    trusting = with_overrides(config, {"field.planes.depth_steps": 0})
    assert (find(trusting, 5) > 0.75).double().mean() < 0.4


def test_the_seed_decides(config: Config):
    short = with_overrides(config, {"field.planes.depth_steps": 3})
    assert torch.equal(find(short, 2), find(short, 2))
    assert not torch.equal(find(short, 2), find(replace(short, seed=1), 2))

import pytest
import torch

from cbnerf.config import Config
from cbnerf.data.renders import Renders
from cbnerf.data.scene import Scene
from cbnerf.metrics import psnr, ssim, to_8bit
from cbnerf.nerf.model import build_field, render_image
from cbnerf.nerf.rays import Cameras
from cbnerf.nerf.warp import find_positions
from cbnerf.training.evaluation import (
    Score,
    image_strip,
    mean_score,
    mean_scores,
    refine_views,
    render_views,
    sr_views,
)
from cbnerf.training.models import build_refiner

CPU = torch.device("cpu")


def test_a_strip_shows_images_from_left_to_right():
    images = [torch.full((3, 5, 3), value, dtype=torch.uint8) for value in (10, 20, 30)]
    strip = image_strip(images, gap=2)
    assert strip.shape == (3, 3 * 5 + 2 * 2, 3)
    assert strip[1, :, 2].tolist() == [10] * 5 + [255] * 2 + [20] * 5 + [255] * 2 + [30] * 5


def test_mean_scores_are_means_of_views(tiny_scene: Scene, tiny_renders: Renders):
    images, targets = tiny_renders.rgb[:3], tiny_scene.images[:3]
    pairs = list(zip(images, targets, strict=True))
    assert mean_scores(images, targets, "test") == pytest.approx({
        "test/psnr": sum(psnr(*pair) for pair in pairs) / 3,
        "test/ssim": sum(ssim(*pair) for pair in pairs) / 3,
    })  # fmt: skip
    assert mean_scores(images[:0], targets[:0], "test") == {}


def test_the_mean_of_perceptual_scores_is_there_where_all_of_them_are():
    with_flip = [Score(20.0, 0.5, 0.2), Score(30.0, 0.7, 0.4)]
    assert mean_score(with_flip) == pytest.approx(Score(25.0, 0.6, 0.3))
    assert mean_score([Score(20.0, 0.5), Score(30.0, 0.7)]) == Score(25.0, 0.6, None)


def test_views_are_refined_one_by_one_and_stay_8_bit(tiny_config: Config, tiny_renders: Renders):
    torch.manual_seed(0)
    refiner = build_refiner(tiny_config).eval()
    with torch.no_grad():
        refiner.get_parameter("network.tail.0.weight").normal_(std=0.1)
        refiner.get_parameter("filters.table").normal_(std=0.02)
    odd = Renders(*(part[:2, :47, :63].contiguous() for part in tiny_renders))
    refined = refine_views(refiner, odd, CPU)
    assert refined.dtype == torch.uint8 and refined.shape == odd.rgb.shape
    assert not torch.equal(refined, odd.rgb)
    second = torch.cat([odd.rgb[1].float() / 255, odd.positions[1].float()], dim=-1)
    alone = refiner.refine(second.movedim(-1, 0)[None])[0].movedim(0, -1)
    assert torch.equal(refined[1], to_8bit(alone))


def test_no_views_are_refined_to_none(tiny_config: Config, tiny_renders: Renders):
    refined = refine_views(build_refiner(tiny_config), tiny_renders.of([]), CPU)
    assert refined.shape == (0, 48, 64, 3)


def test_views_are_colours_and_then_positions(tiny_renders: Renders):
    views = sr_views(tiny_renders, CPU)
    assert len(views) == len(tiny_renders.rgb)
    for view in (0, 7):
        assert views[view].shape == (1, 6, 48, 64) and views[view].dtype == torch.float32
        colours, positions = views[view][0].movedim(0, -1).split(3, dim=-1)
        assert torch.equal((colours * 255).round().byte(), tiny_renders.rgb[view])
        assert torch.equal(positions.half(), tiny_renders.positions[view])


def test_an_untrained_refiner_gives_the_render_back_bit_by_bit(tiny_config, tiny_renders: Renders):
    refiner = build_refiner(tiny_config).eval()
    some = tiny_renders.of([0])
    assert torch.equal(refine_views(refiner, some, CPU), some.rgb)


def test_rendered_views_stand_in_the_order_asked_for(tiny_config: Config, tiny_cameras: Cameras):
    torch.manual_seed(0)
    model = build_field(tiny_config, tiny_cameras).eval()
    renders = render_views(model, tiny_cameras, [5, 2], 2)
    for index, view in enumerate([5, 2]):
        rgb, depth = render_image(model, tiny_cameras, view, 2)
        assert torch.equal(renders.rgb[index], to_8bit(rgb))
        assert torch.equal(renders.depth[index], depth.half())
        positions = find_positions(tiny_cameras, depth, view)
        assert torch.equal(renders.positions[index], positions.half())

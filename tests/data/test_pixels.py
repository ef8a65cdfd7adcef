import torch

from cbnerf.data.pixels import PixelSampler
from cbnerf.data.scene import Scene
from cbnerf.rng import Rng

CPU = torch.device("cpu")


def test_pixels_have_the_colour_of_their_place(tiny_scene: Scene):
    sampler = PixelSampler(tiny_scene, [2, 7, 5], "box", CPU)
    batch = sampler.draw(500, Rng(0, 0, CPU))
    low_res = tiny_scene.low_res("box")
    expected = low_res[batch.views, batch.rows, batch.columns].float() / 255
    torch.testing.assert_close(batch.rgb, expected)


def test_all_pixels_of_the_chosen_views_are_drawn_alike(tiny_scene: Scene):
    batch = PixelSampler(tiny_scene, [2, 7, 5], "box", CPU).draw(30_000, Rng(0, 0, CPU))
    for values, choices in ((batch.views, {2, 7, 5}), (batch.rows, range(24)),
                            (batch.columns, range(32))):  # fmt: skip
        found, counts = values.unique(return_counts=True)
        assert set(found.tolist()) == set(choices)
        expected = 30_000 / len(choices)
        assert (counts - expected).abs().max() < 6 * expected**0.5

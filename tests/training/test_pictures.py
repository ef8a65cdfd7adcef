import pytest
import torch
from torch import Tensor

from cbnerf.overrides import with_overrides
from cbnerf.presets import METHODS
from cbnerf.training.models import build_refiner
from cbnerf.training.pictures import color_codes, draw_agreement, draw_codes, draw_map, draw_usage

SMALL = {"codebook.size": 10, "codebook.dim": 4}


def count_pixels(picture: Tensor, color: tuple[int, int, int]) -> int:
    return int((picture == torch.tensor(color)).all(-1).sum())


def test_codes_are_the_centres_of_decoded_fields_in_the_order_asked_for():
    torch.manual_seed(0)
    autoencoder = build_refiner(with_overrides(METHODS["cb-nerf-paper"], SMALL)).autoencoder
    order = torch.arange(10).flip(0)
    sheet = draw_codes(autoencoder, order, zoom=1)
    # 4 columns and 3 rows of 12 pixels and 2 of gap; the last two places are empty.
    assert sheet.shape == (3 * 14, 4 * 14, 3)
    assert (sheet[28:, 28:] == 255).all()
    field = autoencoder.quantizer.codes()[3].expand(1, 9, 9, -1)
    patch = autoencoder.decode(field).image[0, :, 12:24, 12:24].detach().flatten()
    drawn = sheet[15:27, 29:41].movedim(-1, 0).flatten().double()  # place 6 is code 3
    unclipped = (drawn > 0) & (drawn < 255)
    both = torch.stack([patch[unclipped].double(), drawn[unclipped]])
    assert torch.corrcoef(both)[0, 1] > 0.999


def test_a_code_of_a_pixel_is_the_patch_that_it_leaves_in_an_empty_image():
    torch.manual_seed(0)
    autoencoder = build_refiner(with_overrides(METHODS["cb-nerf"], SMALL)).autoencoder
    sheet = draw_codes(autoencoder, torch.arange(10), zoom=1)
    assert sheet.shape == (3 * 9, 4 * 9, 3)
    field = torch.zeros(1, 11, 11, 4 + 3)  # features, and the position that it ignores
    field[0, 5, 5] = autoencoder.quantizer.codes()[0]
    patch = autoencoder.decode(field).image[0, :, 2:9, 2:9].detach().flatten().double()
    both = torch.stack([patch, sheet[1:8, 1:8].movedim(-1, 0).flatten().double()])
    assert torch.corrcoef(both)[0, 1] > 0.99


def test_usage_shows_bars_for_photographs_and_dots_for_renders():
    photograph, render = (70, 110, 170), (225, 120, 40)
    some, more = torch.tensor([0, 0, 1, 0]), torch.tensor([10, 5, 1, 0])
    few_bars, many_bars = draw_usage(some, some), draw_usage(more, some)
    assert count_pixels(many_bars, photograph) > 2 * count_pixels(few_bars, photograph)
    legend = count_pixels(draw_usage(some, torch.zeros_like(some)), render)
    one, three = (count_pixels(draw_usage(more, counts), render) for counts in (some, more))
    assert legend < one < three


def test_a_map_has_the_colour_of_each_code_at_its_pixels():
    colors = torch.randint(256, (300, 3), dtype=torch.uint8)
    picture = draw_map(torch.tensor([[0, 1, 2], [2, 1, 299]]), colors, 4)
    assert picture.shape == (8, 12, 3)
    assert torch.equal(picture[::4, ::4].flatten(0, 1), colors[[0, 1, 2, 2, 1, 299]])
    assert torch.equal(picture[4:, 8:], colors[299].expand(4, 4, 3))


@pytest.mark.parametrize("dim", [2, 3, 16])
def test_similar_codes_have_similar_colours(dim: int):
    codes = torch.randn(200, dim, generator=torch.Generator().manual_seed(0))
    colors = color_codes(torch.cat([codes, codes + 1e-3])).int()
    assert (colors[:200] - colors[200:]).abs().max() <= 4
    assert len(colors[:200].unique(dim=0)) > 190


def test_agreement_is_white():
    picture = draw_agreement(torch.tensor([[1, 2]]), torch.tensor([[1, 3]]), 4)
    assert (picture[:, :4] == 255).all() and (picture[:, 4:] == 0).all()

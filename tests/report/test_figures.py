import numpy as np
import pytest
import torch
from PIL import Image

from cbnerf.report.figures import (
    LARGEST_ERROR,
    Panel,
    choose_crop,
    crop_side,
    cut_crop,
    draw_grid,
    error_map,
    mark_crop,
)


def gray(value: int, height: int = 48, width: int = 64) -> torch.Tensor:
    return torch.full((height, width, 3), value, dtype=torch.uint8)


def test_the_crop_lies_where_the_photograph_has_detail_that_low_resolution_loses():
    photograph = gray(128)
    checks = ((torch.arange(16)[:, None] + torch.arange(16)) % 2 * 200).to(torch.uint8)
    photograph[20:36, 40:56] = checks[..., None]
    # Coarse structure, however strong, does not count: low resolution keeps it.
    photograph[:, :24] = 255
    assert choose_crop(photograph, 2, 16) == (20, 40)
    assert crop_side(504) == 63 and crop_side(64) == 16


def test_a_crop_is_cut_at_its_place_and_enlarged_without_smoothing():
    photograph = gray(0)
    photograph[8:24, 16:32] = 200
    crop = np.asarray(cut_crop(photograph, (8, 16), 16))
    assert crop.shape == (192, 192, 3) and (crop == 200).all()
    assert set(np.unique(np.asarray(cut_crop(photograph, (0, 0), 32)))) == {0, 200}


def test_the_place_of_the_crop_is_framed():
    marked = np.asarray(mark_crop(gray(0), (8, 16), 16)).astype(int)
    assert marked.shape == (192, 256, 3)
    rows, columns = np.nonzero(marked[..., 0] > 200)
    assert (rows.min(), columns.min()) == pytest.approx((8 * 4, 16 * 4), abs=2)
    assert (rows.max(), columns.max()) == pytest.approx((24 * 4, 32 * 4), abs=2)


@pytest.mark.parametrize(
    "share, color",
    [(0, (0, 0, 0)), (1 / 3, (255, 0, 0)), (2 / 3, (255, 255, 0)), (1, (255, 255, 255)),
     (2, (255, 255, 255))],
)  # fmt: skip
def test_errors_are_black_red_yellow_white(share: float, color: tuple[int, int, int]):
    error = round(share * LARGEST_ERROR * 255)
    picture = np.asarray(error_map(gray(100), gray(100 + error))).astype(int)
    assert np.abs(picture - color).max() <= 8  # an error is a whole number of levels
    assert picture.shape == (180, 240, 3)


def test_a_grid_shows_every_panel_where_it_belongs():
    colors = [["red", "lime"], ["blue", "yellow"]]
    rows = [
        (f"row {n}", [Panel(Image.new("RGB", (60, 40), color), ("12.34 dB",)) for color in line])
        for n, line in enumerate(colors)
    ]
    grid = np.asarray(draw_grid(["left", "right"], rows, Panel(Image.new("RGB", (50, 9)), ("x",))))
    places = {}
    for color in ("red", "lime", "blue", "yellow"):
        mask = (grid == np.asarray(Image.new("RGB", (1, 1), color))[0, 0]).all(-1)
        assert mask.sum() == 60 * 40, color
        places[color] = tuple(position.min() for position in np.nonzero(mask))
    assert places["red"][0] == places["lime"][0] < places["blue"][0] == places["yellow"][0]
    assert places["red"][1] == places["blue"][1] < places["lime"][1] == places["yellow"][1]
    assert (grid[..., 0] < 100).any()  # there are letters

import pytest
import torch

from cbnerf.data.patches import PatchBatch, PatchSampler
from cbnerf.data.renders import Renders
from cbnerf.rng import Rng

CPU = torch.device("cpu")
VIEWS, HEIGHT, WIDTH, SIZE = 3, 12, 20, 8


@pytest.fixture
def photographs() -> torch.Tensor:
    """Every pixel tells its place: (view, row, column)."""
    places = torch.meshgrid(*map(torch.arange, (VIEWS, HEIGHT, WIDTH)), indexing="ij")
    return torch.stack(places, dim=-1).byte()


def draw(
    photographs: torch.Tensor, number: int, size: int = SIZE, *, turned: bool = True
) -> PatchBatch:
    """From renders that are brighter by 100, and positions that are lower by 50."""
    renders = Renders(photographs + 100, photographs.half() - 50)
    sampler = PatchSampler(renders, photographs, size, CPU, turned=turned)
    return sampler.draw(number, Rng(0, 0, CPU))


@pytest.mark.parametrize("turned", [True, False])
def test_render_positions_and_photograph_are_cut_and_turned_alike(photographs, turned: bool):
    batch = draw(photographs, 200, turned=turned)
    render, positions = batch.sr.split(3, dim=1)
    torch.testing.assert_close(render * 255 - 100, batch.high_res * 255, atol=1e-3, rtol=0)
    torch.testing.assert_close(positions + 50, batch.high_res * 255, atol=1e-3, rtol=0)


def test_without_turns_patches_are_cuts_of_one_place(photographs):
    batch = draw(photographs, 300, turned=False)
    parts = *batch.sr.split(3, dim=1), batch.high_res
    for render, positions, photograph in zip(*parts, strict=True):
        view, top, left = (int(number) for number in photograph[:, 0, 0].mul(255).round())
        cut = photographs[view, top : top + SIZE, left : left + SIZE].movedim(-1, 0).float()
        assert torch.equal(photograph, cut / 255)
        assert torch.equal(render, (cut + 100) / 255)
        assert torch.equal(positions, cut - 50)


def test_patches_are_squares_of_one_view_in_all_eight_symmetries(photographs):
    patches = (draw(photographs, 300).high_res * 255).round().long()
    seen = set()
    for view, rows, columns in patches:
        assert (view == view[0, 0]).all()
        down = rows[1, 0] - rows[0, 0], columns[1, 0] - columns[0, 0]
        right = rows[0, 1] - rows[0, 0], columns[0, 1] - columns[0, 0]
        seen.add(tuple(int(step) for step in (*down, *right)))
        # One step down or right is the same everywhere.
        for values, (d, r) in zip((rows, columns), zip(down, right, strict=True), strict=True):
            assert (values.diff(dim=0) == d).all() and (values.diff(dim=1) == r).all()
    ones = (-1, 1)
    expected = {(a, 0, 0, b) for a in ones for b in ones} | {
        (0, a, b, 0) for a in ones for b in ones
    }
    assert seen == expected


@pytest.mark.parametrize("turned", [True, False])
def test_every_place_of_every_view_is_reached(photographs, turned: bool):
    patches = (draw(photographs, 3000, turned=turned).high_res * 255).round().long()
    corners = {tuple(corner) for corner in patches.amin((2, 3)).tolist()}
    tops, lefts = range(HEIGHT - SIZE + 1), range(WIDTH - SIZE + 1)
    assert corners == {(v, top, left) for v in range(VIEWS) for top in tops for left in lefts}


def test_a_patch_may_be_as_large_as_the_image(photographs):
    assert draw(photographs, 2, HEIGHT).high_res.shape == (2, 3, HEIGHT, HEIGHT)


def test_a_patch_larger_than_the_image_is_refused(photographs):
    with pytest.raises(ValueError, match="refiner.patch_size = 16 does not fit into 20x12 images"):
        draw(photographs, 1, 16)

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cbnerf.nerf import planes as module
from cbnerf.nerf.planes import (
    FeaturePlanes,
    Planes,
    interpolate_planes,
    split_table,
    total_variation,
)


@pytest.fixture(params=[True, False], ids=["compiled", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of a CPU: with numba, and without it as on GPUs."""
    if request.param:
        pytest.importorskip("numba")
    monkeypatch.setattr("cbnerf.kernels.HAS_NUMBA", request.param)


def join(planes: list[Tensor]) -> Planes:
    sizes = tuple((plane.shape[0], plane.shape[1]) for plane in planes)
    return Planes(torch.cat([plane.reshape(-1, plane.shape[-1]) for plane in planes]), sizes)


def look_up(plane: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """Bilinear sample of `[height width channels]`, -1 and 1 being the outermost cell centres."""
    height, width, _ = plane.shape
    column, row = (x + 1) / 2 * (width - 1), (y + 1) / 2 * (height - 1)
    column, row = min(max(column, 0), width - 1), min(max(row, 0), height - 1)
    left, top = min(int(column), width - 2), min(int(row), height - 2)
    right_share, low_share = column - left, row - top
    return (
        (1 - low_share) * (1 - right_share) * plane[top, left]
        + (1 - low_share) * right_share * plane[top, left + 1]
        + low_share * (1 - right_share) * plane[top + 1, left]
        + low_share * right_share * plane[top + 1, left + 1]
    )


SIZES = [(4, 5), (3, 5), (3, 4), (2, 3), (2, 3), (2, 2)]
"""Of the (x, y), (x, z) and (y, z) planes of two cell sizes."""


def make_planes() -> list[torch.Tensor]:
    return [torch.rand(*size, 2, dtype=torch.float64, requires_grad=True) for size in SIZES]


def test_planes_are_looked_up_as_a_python_loop_does(kernels):
    torch.manual_seed(0)
    planes = make_planes()
    points = 2.4 * torch.rand(40, 3, dtype=torch.float64) - 1.2  # also outside: the border goes on
    found = interpolate_planes(join(planes), points)
    for point, features in zip(points.tolist(), found, strict=True):
        expected = torch.ones(2, 2, dtype=torch.float64)
        for number, plane in enumerate(planes):
            a, b = [(0, 1), (0, 2), (1, 2)][number % 3]
            expected[number // 3] *= look_up(plane.detach(), point[a], point[b])
        torch.testing.assert_close(features, expected.flatten())


@pytest.mark.parametrize("rows_at_once", [7, 16384])
def test_planes_learn_as_finite_differences_say(rows_at_once: int, kernels, monkeypatch):
    monkeypatch.setattr(module, "_CACHED_ROWS", rows_at_once)
    torch.manual_seed(0)
    points = 2.4 * torch.rand(10, 3, dtype=torch.float64) - 1.2
    torch.autograd.gradcheck(
        lambda *planes: interpolate_planes(join(list(planes)), points), make_planes()
    )


def test_lookups_agree_with_grid_sample(kernels):
    torch.manual_seed(0)
    planes = [torch.rand(*size, 4, requires_grad=True) for size in [(30, 40), (20, 40), (20, 30)]]
    points = 2.4 * torch.rand(500, 3) - 1.2
    sampled = [
        F.grid_sample(
            plane.permute(2, 0, 1)[None], points[None, None][..., [a, b]],
            align_corners=True, padding_mode="border",
        )[0, :, 0].T
        for plane, (a, b) in zip(planes, [(0, 1), (0, 2), (1, 2)], strict=True)
    ]  # fmt: skip
    expected = sampled[0] * sampled[1] * sampled[2]
    found = interpolate_planes(join(planes), points)
    torch.testing.assert_close(found, expected)
    weights = torch.rand_like(found)
    for ours, theirs in zip(
        torch.autograd.grad(found, planes, weights),
        torch.autograd.grad(expected, planes, weights),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads: int):
    pytest.importorskip("numba")
    torch.manual_seed(0)
    composed = join([torch.rand(*size, 16, requires_grad=True) for size in SIZES])
    points = 2.4 * torch.rand(501, 3) - 1.2
    weights = torch.rand(501, 32)

    def train() -> tuple[Tensor, ...]:
        features = interpolate_planes(composed, points)
        loss = (features * weights).sum() + total_variation(composed)
        return features, loss, *torch.autograd.grad(loss, composed.table, retain_graph=True)

    alone = train()
    try:
        torch.set_num_threads(threads)
        together = train()
    finally:
        torch.set_num_threads(1)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


def test_a_point_that_is_no_number_gives_none():
    """A kernel must not read outside the table, nor hide that something went wrong. (Without
    kernels, torch refuses the cell.)"""
    pytest.importorskip("numba")
    points = torch.zeros(3, 3)
    points[1, 2] = torch.nan
    found = interpolate_planes(join([torch.rand(*size, 2) for size in SIZES]), points)
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


def test_planes_have_the_cells_of_their_axes():
    x, y, z = 9, 7, 5
    planes = FeaturePlanes((x, y, z), channels=2, levels=3, scales=(1, 3))
    sizes = planes.compose().sizes
    assert sizes == ((y, x), (z, x), (z, y), (2, 3), (2, 3), (2, 2))
    # ceil(size / 2^level), never less than two cells
    grids = [tuple(grid.shape[:2]) for grid in planes.grids][:9]
    assert grids == [(7, 9), (4, 5), (2, 3), (5, 9), (3, 5), (2, 3), (5, 7), (3, 4), (2, 2)]


def test_a_plane_is_the_sum_of_its_levels(kernels):
    planes = FeaturePlanes((8, 8, 8), channels=1, levels=3, scales=(1,))
    with torch.no_grad():
        for grid in planes.grids:
            grid.zero_()
        planes.grids[0][3, 5, 0] = 7.0
        planes.grids[1].fill_(0.5)
        # A coarse grid that rises linearly rises linearly in the fine one.
        planes.grids[2].copy_(torch.linspace(-1, 1, 2).expand(2, 2)[..., None])
    expected = 0.5 + torch.linspace(-1, 1, 8).expand(8, 8).clone()
    expected[3, 5] += 7
    first, second, _ = split_table(*planes.compose())
    torch.testing.assert_close(first[..., 0], expected)
    assert second.count_nonzero() == 0


@pytest.mark.parametrize("cells", [(2, 3, 5), (7, 9, 17), (12, 10, 6)])
def test_coarser_grids_are_enlarged_as_torch_does(cells: tuple[int, int, int], kernels):
    torch.manual_seed(0)
    planes = FeaturePlanes(cells, channels=2, levels=2, scales=(1,))
    with torch.no_grad():
        for grid in planes.grids:
            grid.uniform_()
    for number, plane in enumerate(split_table(*planes.compose())):
        fine, coarse = planes.grids[2 * number : 2 * number + 2]
        image = coarse.permute(2, 0, 1)[None]
        size = fine.shape[:2]
        enlarged = F.interpolate(image, size, mode="bilinear", align_corners=True)[0]
        torch.testing.assert_close(plane, fine + enlarged.permute(1, 2, 0))


@pytest.mark.parametrize("levels", [1, 3])
def test_grids_learn_as_torch_says(levels: int, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("numba")
    torch.manual_seed(0)
    planes = FeaturePlanes((9, 6, 3), channels=2, levels=levels, scales=(1, 2)).double()
    for grid in planes.grids:
        torch.nn.init.uniform_(grid)
    weights = torch.rand_like(planes.compose().table)
    gradients = []
    for compiled in (True, False):
        monkeypatch.setattr("cbnerf.kernels.HAS_NUMBA", compiled)
        loss = (planes.compose().table.square() * weights).sum()
        gradients.append(torch.autograd.grad(loss, list(planes.grids)))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_new_field_starts_from_its_coarsest_grids_alone():
    planes = FeaturePlanes((16, 16, 16), channels=4, levels=3, scales=(1, 2))
    for number, grid in enumerate(planes.grids):
        assert (grid.count_nonzero() > 0) == (number % 3 == 2)


def test_total_variation_by_hand(kernels):
    plane = torch.tensor([[0.0, 1.0, 3.0], [0.0, 0.0, 0.0]])[..., None]
    # Down: 0, 1, 9 over 3; right: 1, 4, 0, 0 over 4. A flat plane adds nothing.
    flat = torch.ones(4, 4, 1)
    assert total_variation(join([plane, flat, flat])).item() == pytest.approx(10 / 3 + 5 / 4)


def test_total_variation_learns_as_finite_differences_say(kernels):
    torch.manual_seed(0)
    planes = make_planes()
    torch.autograd.gradcheck(lambda *planes: total_variation(join(list(planes))), planes)


def test_cells_beyond_the_integers_of_float32_are_found(kernels):
    side = 4200  # squared more than 2^24
    columns = torch.arange(side) % 2.0
    plane, one = columns.expand(side, side)[..., None], torch.ones(2, 2, 1)
    along_x = torch.arange(100, 110) / (side - 1) * 2 - 1
    points = torch.stack([along_x, torch.full((10,), 4150 / (side - 1) * 2 - 1), along_x], dim=1)
    found = interpolate_planes(join([plane, one, one]), points)[:, 0]
    torch.testing.assert_close(found, columns[100:110], atol=2e-3, rtol=0)

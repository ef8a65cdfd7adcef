import math

import pytest
import torch
import torch.nn.functional as F

from cbnerf.config import MLPConfig, PlanesConfig
from cbnerf.nerf.fields import (
    FeaturePlanes,
    MLPField,
    PlanesField,
    density_activation,
    encode,
    enlarge,
    interpolate_planes,
    join_planes,
    total_variation,
)


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


def test_planes_are_looked_up_as_a_python_loop_does():
    torch.manual_seed(0)
    planes = make_planes()
    points = 2.4 * torch.rand(40, 3, dtype=torch.float64) - 1.2  # also outside: the border goes on
    found = interpolate_planes(join_planes(planes), points)
    for point, features in zip(points.tolist(), found, strict=True):
        expected = torch.ones(2, 2, dtype=torch.float64)
        for number, plane in enumerate(planes):
            a, b = [(0, 1), (0, 2), (1, 2)][number % 3]
            expected[number // 3] *= look_up(plane.detach(), point[a], point[b])
        torch.testing.assert_close(features, expected.flatten())


@pytest.mark.parametrize("rows_at_once", [7, 16384])
def test_planes_learn_as_finite_differences_say(rows_at_once: int, monkeypatch):
    monkeypatch.setattr("cbnerf.nerf.fields._CACHED_ROWS", rows_at_once)
    torch.manual_seed(0)
    points = 2.4 * torch.rand(10, 3, dtype=torch.float64) - 1.2
    torch.autograd.gradcheck(
        lambda *planes: interpolate_planes(join_planes(list(planes)), points), make_planes()
    )


def test_lookups_agree_with_grid_sample():
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
    found = interpolate_planes(join_planes(planes), points)
    torch.testing.assert_close(found, expected)
    weights = torch.rand_like(found)
    for ours, theirs in zip(
        torch.autograd.grad(found, planes, weights),
        torch.autograd.grad(expected, planes, weights),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_planes_have_the_cells_of_their_axes():
    x, y, z = 9, 7, 5
    planes = FeaturePlanes((x, y, z), channels=2, levels=3, scales=(1, 3))
    shapes = [tuple(plane.shape) for plane in planes.compose().planes]
    assert shapes == [(y, x, 2), (z, x, 2), (z, y, 2), (2, 3, 2), (2, 3, 2), (2, 2, 2)]
    # ceil(size / 2^level), never less than two cells
    sizes = [tuple(grid.shape[:2]) for grid in planes.grids][:9]
    assert sizes == [(7, 9), (4, 5), (2, 3), (5, 9), (3, 5), (2, 3), (5, 7), (3, 4), (2, 2)]


def test_a_plane_is_the_sum_of_its_levels():
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
    torch.testing.assert_close(planes.compose().planes[0][..., 0], expected)
    assert planes.compose().planes[1].count_nonzero() == 0


@pytest.mark.parametrize("size", [(2, 2), (3, 5), (9, 12), (16, 7)])
def test_planes_are_enlarged_as_torch_does(size: tuple[int, int]):
    grid = torch.rand(2, 7, 3, generator=torch.Generator().manual_seed(0))
    image = grid.permute(2, 0, 1)[None]
    expected = F.interpolate(image, size, mode="bilinear", align_corners=True)[0].permute(1, 2, 0)
    torch.testing.assert_close(enlarge(grid, size), expected, rtol=0, atol=1e-6)


def test_a_new_field_starts_from_its_coarsest_grids_alone():
    planes = FeaturePlanes((16, 16, 16), channels=4, levels=3, scales=(1, 2))
    for number, grid in enumerate(planes.grids):
        assert (grid.count_nonzero() > 0) == (number % 3 == 2)


def test_total_variation_by_hand():
    plane = torch.tensor([[0.0, 1.0, 3.0], [0.0, 0.0, 0.0]])[..., None]
    # Down: 0, 1, 9 over 3; right: 1, 4, 0, 0 over 4. A flat plane adds nothing.
    flat = torch.ones(4, 4, 1)
    assert total_variation(join_planes([plane, flat, flat])).item() == pytest.approx(10 / 3 + 5 / 4)


def test_encoding_in_closed_form():
    x = torch.tensor([0.3, -0.7, 0.1])
    expected = x.tolist()
    for function in (math.sin, math.cos):
        expected += [function(2**k * value) for k in range(3) for value in x.tolist()]
    torch.testing.assert_close(encode(x, 3), torch.tensor(expected))


@pytest.mark.parametrize("frequencies, features", [(10, 63), (4, 27)])
def test_encodings_have_the_published_size(frequencies: int, features: int):
    assert encode(torch.zeros(5, 3), frequencies).shape == (5, features)


def test_mlp_has_the_published_number_of_parameters():
    assert sum(parameter.numel() for parameter in MLPField(MLPConfig()).parameters()) == 595_844


def test_mlp_input_enters_again_in_the_fifth_layer():
    field = MLPField(MLPConfig())
    assert [layer.weight.shape[1] for layer in field.layers] == [63] + [256] * 3 + [319] + [256] * 3


def test_negative_features_reach_the_colour_but_negative_units_do_not():
    """The feature layer alone has no ReLU."""
    torch.manual_seed(0)
    for name, reaches in (("feature", True), ("layers.7", False), ("direction_layer", False)):
        field = MLPField(MLPConfig(width=32))
        with torch.no_grad():
            field.get_submodule(name).bias.fill_(-30)
            field.rgb_head.weight.mul_(0.01)
        color, _ = field(torch.rand(5, 3), torch.rand(5, 3))
        color.sum().backward()
        gradient = field.get_submodule(name).weight.grad
        assert (gradient is not None and gradient.count_nonzero() > 0) == reaches, name


@pytest.mark.parametrize("kind", ["mlp", "planes"])
def test_density_does_not_depend_on_the_direction_but_colour_does(kind: str):
    torch.manual_seed(0)
    points, here, there = 2 * torch.rand(3, 20, 3) - 1
    if kind == "mlp":
        field = MLPField(MLPConfig(width=32))
        (color, density), (other_color, other_density) = field(points, here), field(points, there)
    else:
        field = PlanesField(PlanesConfig(scales=(1, 2), levels=2), (16, 12, 8))
        composed = field.planes.compose()
        color, density = field(composed, points, here)
        other_color, other_density = field(composed, points, there)
        assert (density > 0).all()
    assert torch.equal(density, other_density)
    assert not torch.equal(color, other_color)
    assert 0 <= color.min() and color.max() <= 1


def test_density_is_linear_when_dense_and_never_negative():
    raw = torch.tensor([-100.0, 1.0, 101.0])
    expected = torch.tensor([0.0, 10 * math.log(2), 1000.0])
    torch.testing.assert_close(density_activation(raw), expected)


def test_an_untrained_ray_is_mostly_opaque_at_its_end():
    alpha = 1 - torch.exp(-density_activation(torch.zeros(1)))
    assert 0.9 < float(alpha) < 0.99


def test_cells_beyond_the_integers_of_float32_are_found():
    side = 4200  # squared more than 2^24
    columns = torch.arange(side) % 2.0
    plane, one = columns.expand(side, side)[..., None], torch.ones(2, 2, 1)
    along_x = torch.arange(100, 110) / (side - 1) * 2 - 1
    points = torch.stack([along_x, torch.full((10,), 4150 / (side - 1) * 2 - 1), along_x], dim=1)
    found = interpolate_planes(join_planes([plane, one, one]), points)[:, 0]
    torch.testing.assert_close(found, columns[100:110], atol=2e-3, rtol=0)

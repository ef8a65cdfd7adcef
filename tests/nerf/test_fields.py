import math

import pytest
import torch

from cbnerf.config import MLPConfig, PlanesConfig
from cbnerf.nerf.fields import MLPField, PlanesField, density_activation, encode


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

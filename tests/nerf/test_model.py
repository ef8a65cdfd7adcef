import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cbnerf.config import Config
from cbnerf.nerf.fields import FeaturePlanes
from cbnerf.nerf.model import (
    AUTO_PRECISION,
    FieldModel,
    PlanesModel,
    autocast,
    build_field,
    multiplies_bfloat16,
    proposal_loss,
    render_image,
    resolve_precision,
    settle_precision,
)
from cbnerf.nerf.rays import Cameras, make_sub_pixel_rays
from cbnerf.overrides import with_overrides
from cbnerf.presets import METHODS
from cbnerf.rng import Rng
from cbnerf.training.field import low_res_cameras

SMALL = {
    "field.num_coarse_samples": 8, "field.num_fine_samples": 6, "field.mlp.width": 16,
    "field.precision": "float32", "field.planes.hidden": 8, "field.planes.depth_cells": 12,
}  # fmt: skip
CONFIGS = {
    kind: with_overrides(METHODS[method], SMALL)
    for kind, method in (("planes", "cb-nerf"), ("mlp", "nerf-sr"))
}
every_kind = pytest.mark.parametrize("kind", CONFIGS)


@pytest.fixture
def cameras(tiny_cameras: Cameras) -> Cameras:
    """Images of 12 x 16 pixels."""
    return low_res_cameras(tiny_cameras, 4)


def make_field(config: Config, cameras: Cameras) -> FieldModel:
    """With enough contrast to tell one pixel from the next."""
    torch.manual_seed(0)
    model = build_field(config, cameras)
    if isinstance(model, PlanesModel):
        with torch.no_grad():
            for grid in model.field.get_submodule("planes.grids").parameters():
                grid.uniform_(-2, 2)
    return model


@every_kind
def test_sub_pixels_of_an_image_stand_in_their_places(kind: str, cameras: Cameras):
    model, scale, view = make_field(CONFIGS[kind], cameras), 2, 3
    rgb, depth = render_image(model, cameras, view, scale)
    assert rgb.shape == (*cameras.size, 3) and depth.shape == cameras.size
    assert rgb.std(dim=(0, 1)).min() > 1e-3
    for row in range(cameras.size[0] // scale):
        for column in range(cameras.size[1] // scale):
            pixel = torch.tensor([[view], [row], [column]])
            rays = make_sub_pixel_rays(cameras, *pixel, scale, torch.arange(scale**2)[None])
            expected = model(rays, None).passes[-1]
            for number in range(scale**2):
                place = row * scale + number // scale, column * scale + number % scale
                torch.testing.assert_close(rgb[place], expected.rgb[number])
                torch.testing.assert_close(depth[place], expected.depth[number])


def test_mlp_pixels_do_not_know_their_neighbours(cameras: Cameras):
    model = make_field(CONFIGS["mlp"], cameras)
    rgb, _ = render_image(model, cameras, 0, 2)
    torch.testing.assert_close(rgb, render_image(model, cameras, 0, 1)[0])


@every_kind
def test_images_do_not_depend_on_the_chunk(kind: str, cameras: Cameras):
    model = make_field(CONFIGS[kind], cameras)
    whole, parts = (render_image(model, cameras, 1, 2, chunk=chunk) for chunk in (8192, 20))
    torch.testing.assert_close(parts, whole)


def draw_rays(cameras: Cameras, sub_rays: int = 2):
    views, rows, columns = torch.tensor([[0, 1, 2], [0, 3, 5], [7, 2, 0]])
    chosen = torch.arange(sub_rays).expand(3, -1)
    return make_sub_pixel_rays(cameras, views, rows, columns, 2, chosen)


@every_kind
def test_every_parameter_learns(kind: str, cameras: Cameras):
    model = make_field(CONFIGS[kind], cameras)
    output = model(draw_rays(cameras), Rng(0, 0, torch.device("cpu")))
    assert len(output.passes) == (2 if kind == "mlp" else 1)
    rgb = torch.stack([rendering.rgb for rendering in output.passes])
    assert rgb.shape[1:] == (6, 3)
    (rgb.square().sum() + output.regularization).backward()
    assert not [n for n, parameter in model.named_parameters() if parameter.grad is None]


@every_kind
def test_only_noise_makes_renderings_differ(kind: str, cameras: Cameras):
    model, rays = make_field(CONFIGS[kind], cameras), draw_rays(cameras)

    def render(rng: Rng | None) -> torch.Tensor:
        return model(rays, rng).passes[-1].rgb

    assert torch.equal(render(None), render(None))
    draw = [Rng(0, step, torch.device("cpu")) for step in (0, 0, 1)]
    first, again, other = map(render, draw)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


EDGES = torch.tensor([[0.0, 0.2, 0.5, 0.6, 1.0]])
WEIGHTS = torch.tensor([[0.1, 0.3, 0.2, 0.05]])


@pytest.mark.parametrize(
    "bins, proposed",
    [
        ([0.0, 0.2, 0.5, 0.6, 1.0], [0.1, 0.3, 0.2, 0.05]),  # the same
        ([0.0, 0.5, 1.0], [0.4, 0.25]),  # summed over coarser bins
        ([0.0, 0.1, 0.4, 0.7, 1.0], [0.1, 0.3, 0.2, 0.05]),  # touching bins count whole
        ([0.0, 1.0], [1.0]),
    ],
)
def test_an_enveloping_proposal_costs_nothing(bins, proposed):
    loss = proposal_loss(torch.tensor([bins]), torch.tensor([proposed]), EDGES, WEIGHTS)
    assert loss.item() == pytest.approx(0, abs=1e-10)


def test_proposal_loss_by_hand():
    # The bins before 0.5 hold 0.25 together: 0.3 of the second sample is 0.05 too much.
    bins, proposed = torch.tensor([[0.0, 0.5, 1.0]]), torch.tensor([[0.25, 0.3]])
    loss = proposal_loss(bins, proposed, EDGES, WEIGHTS)
    assert loss.item() == pytest.approx(0.05**2 / 0.3, rel=1e-3)


def test_proposals_learn_only_from_their_own_loss(cameras: Cameras):
    model = make_field(CONFIGS["planes"], cameras)
    assert isinstance(model, PlanesModel)
    output = model(draw_rays(cameras), None)
    output.passes[0].rgb.sum().backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in model.proposal.parameters())
    output.regularization.backward()
    assert all(parameter.grad is not None for parameter in model.proposal.parameters())
    # The field is pulled by the total variation alone, which knows nothing of its networks.
    model.zero_grad()
    model(draw_rays(cameras), None).regularization.backward()
    assert all(parameter.grad is None for parameter in model.field.density_net.parameters())


def test_planes_are_composed_once_for_an_image(cameras: Cameras, monkeypatch: pytest.MonkeyPatch):
    model = make_field(CONFIGS["planes"], cameras)
    expected, _ = render_image(model, cameras, 0, 2, chunk=10**6)
    calls = []
    compose = FeaturePlanes.compose
    monkeypatch.setattr(FeaturePlanes, "compose", lambda self: calls.append(1) or compose(self))
    rendered, _ = render_image(model, cameras, 0, 2, chunk=64)
    torch.testing.assert_close(rendered, expected)
    assert len(calls) == 2  # of the field and of its proposals


@pytest.mark.skipif(
    platform.system() != "Linux" or not hasattr(torch.cpu, "get_capabilities"),
    reason="asks the kernel and a later torch",
)
def test_networks_multiply_in_bfloat16_where_the_processor_does(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(AUTO_PRECISION, raising=False)
    cpu, field = torch.device("cpu"), METHODS["cb-nerf"].field
    told = {"avx512_bf16", "bf16"} & set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    assert multiplies_bfloat16(cpu) == bool(told)
    weight = torch.ones(4, 4)
    for precision, dtype in (
        ("auto", torch.bfloat16 if told else torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float32", torch.float32),
    ):
        with autocast(replace(field, precision=precision), cpu):
            assert (weight @ weight).dtype == dtype


@pytest.mark.parametrize("told", ["bfloat16", "float32"])
def test_the_environment_decides_what_auto_is(told: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(AUTO_PRECISION, told)
    cpu, weight = torch.device("cpu"), torch.ones(4, 4)
    config = METHODS["cb-nerf"]
    assert resolve_precision(config.field, cpu) == told
    with autocast(config.field, cpu):
        assert (weight @ weight).dtype == getattr(torch, told)
    settled = settle_precision(config, cpu)
    assert settled == with_overrides(config, {"field.precision": told})
    for precision in ("bfloat16", "float32"):  # What is named stays.
        assert resolve_precision(replace(config.field, precision=precision), cpu) == precision


def test_another_word_for_a_precision_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(AUTO_PRECISION, "bf16")
    with pytest.raises(ValueError, match="CBNERF_AUTO_PRECISION = 'bf16' must be bfloat16 or flo"):
        resolve_precision(METHODS["cb-nerf"].field, torch.device("cpu"))

"""Which knobs, with which values, a method can search."""

from pathlib import Path

import pytest

from cbnerf.overrides import with_overrides
from cbnerf.presets import preset
from cbnerf.search.space import check_space
from cbnerf.search.spec import load_spec, parse_spec

pytestmark = pytest.mark.search

SHIPPED = sorted((Path(__file__).parents[2] / "tune_configs").glob("*.yaml"))


def check(method: str, space: dict, **fixed) -> None:
    """Double underscores stand for dots."""
    knobs = {name.replace("__", "."): value for name, value in fixed.items()}
    spec = parse_spec({"method": method, "fixed": knobs, "space": space})
    check_space(with_overrides(preset(method, "tiny"), knobs), spec)


BETA, DIM = {"codebook.beta": {"low": 0.1, "high": 1}}, {"codebook.dim": {"choices": [8, 16]}}
BLOCKS, SKIPS = {"refiner.blocks": {"low": 1, "high": 3}}, {"refiner.skips": {"choices": ["hr"]}}
WIDTH = {"field.mlp.width": {"choices": [32, 64]}}
RAYS = {"field.sub_rays": {"choices": [1, 2]}}
KINDS = {"codebook.kind": {"choices": ["vq", "fsq"]}}


@pytest.mark.parametrize(
    "method, space, fixed",
    [
        ("cb-nerf", SKIPS, {}),
        ("cb-nerf", WIDTH, {}),
        ("cb-nerf", DIM, {"codebook__kind": "fsq"}),
        ("cb-nerf", {"codebook.ema_decay": {"low": 0.9, "high": 0.99}}, {"codebook__ema": False,
         "codebook__revive_below": 0}),
        ("cb-nerf", {"refiner.consistency": {"low": 0, "high": 1}}, {}),
        ("cb-nerf", {"refiner.optim.evaluations": {"low": 1, "high": 9}}, {}),
        ("cnn", BETA, {}),
        ("cnn", {"refiner.neighbours": {"choices": [1, 2]}}, {}),
        ("cnn", {"refiner.ridge": {"low": 1, "high": 9}}, {}),
        ("cb-nerf-paper", {"refiner.ridge": {"low": 1, "high": 9}}, {}),
        ("cb-nerf-paper", BLOCKS, {}),
        ("cb-nerf-paper", {"field.planes.levels": {"low": 1, "high": 3}}, {}),
        ("nerf-sr", BLOCKS, {}),
        ("nerf-sr", BETA, {}),
        ("linear", {"refiner.optim.lr": {"low": 1e-3, "high": 1e-2}}, {}),
        ("nerf", RAYS, {}),
        ("cb-nerf", {"field.opposite_sub_rays": {"choices": [True, False]}},
         {"field__sub_rays": 0}),
    ],
)  # fmt: skip
def test_a_knob_without_effect_is_refused(method: str, space: dict, fixed: dict):
    with pytest.raises(ValueError, match=f"space: {next(iter(space))} changes nothing in {method}"):
        check(method, space, **fixed)


@pytest.mark.parametrize(
    "method, space",
    [
        ("cb-nerf", BETA | DIM | BLOCKS | RAYS),
        ("cb-nerf", KINDS | DIM),  # heeded by one of the kinds
        ("cb-nerf", {"codebook.ema": {"choices": [True, False]}} | BETA),
        ("cb-nerf", {"field.kind": {"choices": ["planes", "mlp"]}} | WIDTH),
        ("cb-nerf", {"refiner.kind": {"choices": ["residual", "cnn"]}} | BETA),
        ("cb-nerf-paper", BETA | SKIPS | WIDTH),
        ("nerf-sr", {"refiner.channels": {"choices": [8, 16]}} | WIDTH),
        ("linear", RAYS),
        ("nerf", WIDTH),
    ],
)
def test_a_knob_with_effect_in_some_configurations_is_searched(method: str, space: dict):
    check(method, space)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_spaces_hold_knobs_with_effect(file: Path):
    spec = load_spec(file)
    resolution = "x2-128" if spec.resolution == "auto" else spec.resolution
    check_space(with_overrides(preset(spec.method, resolution), spec.fixed), spec)


@pytest.mark.parametrize(
    "space, fixed, message",
    [
        ({"codebook.size": {"choices": [256, 300]}}, {"codebook__kind": "fsq"},
         "space: codebook.size = 300 must be one of 64"),
        ({"codebook.size": {"low": 64, "high": 1024}}, {"codebook__kind": "fsq"},
         "space: codebook.size = 65 must be one of 64"),
        ({"codebook.imitation": {"choices": ["ce", "vq"]}}, {"codebook__kind": "fsq"},
         "space: codebook.imitation = 'vq' must be"),
        ({"refiner.patch_size": {"low": 8, "high": 12}}, {}, "space: refiner.patch_size = 9 must"),
        ({"refiner.patch_size": {"choices": [32, 128]}}, {}, "patch_size = 128 does not fit into"),
        ({"seed": {"low": 0, "high": 9}}, {}, "space: seed would select by chance"),
    ],
)  # fmt: skip
def test_a_value_that_no_configuration_can_have_is_refused(space, fixed, message: str):
    with pytest.raises(ValueError, match=message):
        check("cb-nerf", space, **fixed)


def test_a_value_that_some_configurations_can_have_is_searched():
    check("cb-nerf", KINDS | {"codebook.size": {"choices": [300, 1024]}})
    check("cb-nerf", {"refiner.patch_size": {"low": 8, "high": 32, "step": 4}})

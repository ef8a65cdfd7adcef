from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from cbnerf.config import FIELD_KNOBS, flatten
from cbnerf.data.library import make_capture
from cbnerf.data.scene import Scene, make_scene
from cbnerf.nerf.model import AUTO_PRECISION, settle_precision
from cbnerf.overrides import with_overrides
from cbnerf.presets import preset
from cbnerf.training import keys
from cbnerf.training.keys import field_key, refiner_key

CONFIG = settle_precision(preset("cb-nerf", "tiny"), torch.device("cpu"))


@pytest.fixture(scope="module")
def scene() -> Scene:
    return make_scene(make_capture("arcade", width=32, num_views=3), CONFIG.data)


def other_value(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return {"planes": "mlp", "box": "lanczos", "float32": "bfloat16",
                "bfloat16": "float32"}[value]  # fmt: skip
    if isinstance(value, tuple):
        return (1, 2, 3)
    return value + 1 if isinstance(value, int) else value / 2


KNOBS = flatten(CONFIG)
STAGE_1 = [name for name in KNOBS if name.startswith(FIELD_KNOBS)]


@pytest.mark.parametrize("name", STAGE_1)
def test_each_knob_of_stage_1_changes_the_key(scene: Scene, name: str):
    changed = with_overrides(CONFIG, {name: other_value(KNOBS[name])})
    assert field_key(changed, scene) != field_key(CONFIG, scene)


def test_knobs_of_stage_2_share_a_field(scene: Scene):
    changes = {
        "codebook.size": 64, "codebook.beta": 1.0, "codebook.imitation": "ce", "codebook.dim": 3,
        "refiner.codes": False, "refiner.optim.steps": 99, "refiner.optim.lr": 1.0,
        "loss.lambda_recon": 3.0, "loss.lambda_imitation": 0.0,
    }  # fmt: skip
    for name, value in changes.items():
        assert field_key(with_overrides(CONFIG, {name: value}), scene) == field_key(CONFIG, scene)


MOVES: dict[str, Callable[[Scene], Scene]] = {
    "pixel": lambda s: replace(s, images=s.images.index_fill(0, torch.tensor([1]), 7)),
    "order": lambda s: replace(s, images=s.images.flip(0)),
    "pose": lambda s: replace(s, camera_to_world=s.camera_to_world + 1e-3),
    "focal": lambda s: replace(s, focal=s.focal * 1.001),
    "center": lambda s: replace(s, center=(s.center[0] + 0.5, s.center[1])),
    "bounds": lambda s: replace(s, depth_range=(s.depth_range[0], s.depth_range[1] * 1.01)),
    "scale": lambda s: replace(s, scale=4),
}


@pytest.mark.parametrize("what", MOVES)
def test_photographs_and_cameras_change_the_key(scene: Scene, what: str):
    assert field_key(CONFIG, MOVES[what](scene)) != field_key(CONFIG, scene)


def test_the_code_of_stage_1_changes_the_key(scene: Scene, monkeypatch: pytest.MonkeyPatch):
    before = field_key(CONFIG, scene)
    monkeypatch.setattr(keys, "_stage_code", lambda: "another version")
    assert field_key(CONFIG, scene) != before


def test_equal_input_has_the_same_key(scene: Scene):
    again = make_scene(make_capture("arcade", width=32, num_views=3), CONFIG.data)
    config = settle_precision(preset("cb-nerf", "tiny"), torch.device("cpu"))
    assert field_key(config, again) == field_key(CONFIG, scene)


def test_machines_of_different_precision_share_no_field(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
):
    auto, found = preset("cb-nerf", "tiny"), []
    with pytest.raises(ValueError, match="needs the precision really used"):
        field_key(auto, scene)
    for precision in ("bfloat16", "float32"):
        monkeypatch.setenv(AUTO_PRECISION, precision)
        found.append(field_key(settle_precision(auto, torch.device("cpu")), scene))
        # Whoever names it shares it.
        named = with_overrides(auto, {"field.precision": precision})
        assert field_key(named, scene) == found[-1]
    assert found[0] != found[1]


def test_a_refiner_has_a_key_for_its_knobs_and_for_all_that_it_learned_from():
    others = [
        refiner_key(with_overrides(CONFIG, {"codebook.size": 7}), ["a"]),
        refiner_key(CONFIG, ["b"]),
        refiner_key(CONFIG, ["a", "b"]),
        refiner_key(CONFIG, ["b", "a"]),
    ]
    assert len({refiner_key(CONFIG, ["a"]), *others}) == 5
    assert refiner_key(CONFIG, ["a"]) == refiner_key(CONFIG, ["a"])

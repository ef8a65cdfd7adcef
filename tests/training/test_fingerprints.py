import ast
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cbnerf
from cbnerf.config import FIELD_KNOBS, flatten
from cbnerf.data.library import make_capture
from cbnerf.data.scene import Scene, make_scene
from cbnerf.nerf.model import AUTO_PRECISION, settle_precision
from cbnerf.overrides import with_overrides
from cbnerf.presets import preset
from cbnerf.training import store
from cbnerf.training.store import (
    FIELD_CODE,
    REFINER_CODE,
    field_fingerprint,
    refiner_fingerprint,
)

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
def test_each_knob_of_stage_1_changes_the_fingerprint(scene: Scene, name: str):
    changed = with_overrides(CONFIG, {name: other_value(KNOBS[name])})
    assert field_fingerprint(changed, scene) != field_fingerprint(CONFIG, scene)


def test_knobs_of_stage_2_share_a_field(scene: Scene):
    changes = {
        "codebook.size": 64, "codebook.beta": 1.0, "codebook.imitation": "ce", "codebook.dim": 3,
        "refiner.kind": "cnn", "refiner.optim.steps": 99, "refiner.optim.lr": 1.0,
        "loss.lambda_recon": 3.0, "loss.lambda_imitation": 0.0,
    }  # fmt: skip
    for name, value in changes.items():
        assert field_fingerprint(with_overrides(CONFIG, {name: value}), scene) == field_fingerprint(
            CONFIG, scene
        )


MOVES: dict[str, Callable[[Scene], Scene]] = {
    "pixel": lambda s: replace(s, images=s.images.index_fill(0, torch.tensor([1]), 7)),
    "order": lambda s: replace(s, images=s.images.flip(0)),
    "pose": lambda s: replace(s, camera_to_world=s.camera_to_world + 1e-3),
    "focal": lambda s: replace(s, intrinsics=s.intrinsics * torch.tensor([1.001, 1, 1, 1])),
    "center": lambda s: replace(s, intrinsics=s.intrinsics + torch.tensor([0, 0, 0.5, 0])),
    "scale": lambda s: replace(s, scale=4),
}


@pytest.mark.parametrize("what", MOVES)
def test_photographs_and_cameras_change_the_fingerprint(scene: Scene, what: str):
    assert field_fingerprint(CONFIG, MOVES[what](scene)) != field_fingerprint(CONFIG, scene)


PACKAGE = Path(cbnerf.__file__).parent


HASH_CODE = store._hash_code.__wrapped__


def edit_prose(text: str) -> str:
    return "# A comment.\n" + re.sub(r'"""(\w)', r'"""Other words. \1', text)


def edit_code(text: str) -> str:
    return text + "\nONE = 1\n"


@pytest.mark.parametrize(
    ("file", "edit", "field_changes", "refiner_changes"),
    [
        ("training/field.py", edit_prose, False, False),
        ("data/scene.py", edit_prose, False, False),  # with docstrings under assignments
        ("codebook/quantizer.py", edit_prose, False, False),
        # The fingerprint of a refiner also holds those of its fields, which are equal here.
        ("nerf/sampling.py", edit_code, True, False),
        ("codebook/quantizer.py", edit_code, False, True),
        ("training/refiner.py", edit_code, False, True),
        ("data/library.py", edit_code, False, False),
    ],
)
def test_code_changes_the_fingerprint_of_its_stage_and_prose_changes_none(
    file: str, edit: Callable[[str], str], field_changes: bool, refiner_changes: bool,
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    before = field_fingerprint(CONFIG, scene), refiner_fingerprint(CONFIG, ["a"])
    package = tmp_path / "cbnerf"
    shutil.copytree(PACKAGE, package)
    text = (package / file).read_text(encoding="utf-8")
    (package / file).write_text(edit(text), encoding="utf-8")
    monkeypatch.setattr(store, "_hash_code", lambda parts: HASH_CODE(parts, package))
    assert edit(text) != text
    assert (field_fingerprint(CONFIG, scene) != before[0]) == field_changes
    assert (refiner_fingerprint(CONFIG, ["a"]) != before[1]) == refiner_changes


def imported_by(module: str) -> set[str]:
    """Files of the package that a file of it imports, transitively."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        file = waiting.pop()
        if file not in found and (PACKAGE / file).exists():
            found.add(file)
            for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cbnerf"):
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                    for name in [str(node.module), *names]:
                        path = name.removeprefix("cbnerf").removeprefix(".").replace(".", "/")
                        waiting += [f"{path}.py", f"{path}/__init__.py".removeprefix("/")]
    return {file for file in found if (PACKAGE / file).stat().st_size}


CANNOT_CHANGE_NUMBERS = {
    "__init__.py", "files.py", "overrides.py", "strict_yaml.py",
    "progress.py", "training/checkpoint.py", "training/divergence.py", "training/preemption.py",
}  # fmt: skip
OF_STAGE_2 = {"codebook", "baselines", "training/models.py", "config.py"}
"""What stage 1 imports for the types of refiners, and knobs, whose values are hashed."""


@pytest.mark.parametrize(
    ("module", "hashed", "others"),
    [
        ("training/field.py", {*FIELD_CODE}, CANNOT_CHANGE_NUMBERS | OF_STAGE_2),
        ("training/refiner.py", {*FIELD_CODE, *REFINER_CODE}, CANNOT_CHANGE_NUMBERS),
    ],
)
def test_all_code_that_can_change_numbers_is_hashed(module: str, hashed: set, others: set):
    files = imported_by(module)
    assert len(files) > 20
    listed = {file for file in files if {file, file.split("/")[0]} & (hashed | others)}
    assert files == listed
    assert not hashed & others
    for part in hashed:  # and nothing that has moved
        assert (PACKAGE / part).exists(), part


def test_equal_input_has_the_same_fingerprint(scene: Scene):
    again = make_scene(make_capture("arcade", width=32, num_views=3), CONFIG.data)
    config = settle_precision(preset("cb-nerf", "tiny"), torch.device("cpu"))
    assert field_fingerprint(config, again) == field_fingerprint(CONFIG, scene)


def test_machines_of_different_precision_share_no_field(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
):
    auto, found = preset("cb-nerf", "tiny"), []
    with pytest.raises(ValueError, match="needs the precision really used"):
        field_fingerprint(auto, scene)
    for precision in ("bfloat16", "float32"):
        monkeypatch.setenv(AUTO_PRECISION, precision)
        found.append(field_fingerprint(settle_precision(auto, torch.device("cpu")), scene))
        # Naming it gives the same one.
        named = with_overrides(auto, {"field.precision": precision})
        assert field_fingerprint(named, scene) == found[-1]
    assert found[0] != found[1]


def test_a_refiner_has_a_key_for_its_knobs_and_for_all_that_it_learned_from():
    others = [
        refiner_fingerprint(with_overrides(CONFIG, {"codebook.size": 7}), ["a"]),
        refiner_fingerprint(CONFIG, ["b"]),
        refiner_fingerprint(CONFIG, ["a", "b"]),
        refiner_fingerprint(CONFIG, ["b", "a"]),
    ]
    assert len({refiner_fingerprint(CONFIG, ["a"]), *others}) == 5
    assert refiner_fingerprint(CONFIG, ["a"]) == refiner_fingerprint(CONFIG, ["a"])

"""The cache: a stage is trained once per scene, configuration, code and seed.

An entry is a folder named by the hash of all that determines it. Studies keep their fields here,
comparisons their refiners, too. `training.stages` says when an entry is finished.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import cbnerf
from cbnerf.config import Config, flatten
from cbnerf.data.scene import Scene

# What stage 1 is made of; a change there makes old entries unreachable.
_STAGE_CODE = (
    "config.py",
    "noise.py",
    "metrics.py",
    "nerf",
    "data/pixels.py",
    "data/renders.py",
    "data/scene.py",
    "data/splits.py",
    "training/evaluation.py",
    "training/field.py",
    "training/loop.py",
)
# What stage 2 adds to it.
_REFINER_CODE = ("codebook", "data/patches.py", "data/references.py", "training/refiner.py")
_STAGE_KNOBS = ("data.", "field.", "seed")


def field_folder(storage: Path, config: Config, scene: Scene) -> Path:
    """The cache entry of a scene's field, finished or not."""
    return folder_of_field(storage, scene.name, field_key(config, scene))


def folder_of_field(storage: Path, name: str, key: str) -> Path:
    """The same by the name of the scene and the key."""
    return storage / "cache" / f"field-{name}-{key}"


def field_key(config: Config, scene: Scene) -> str:
    """Hash of photographs, cameras, the knobs of stage 1 and its code."""
    digest = hashlib.sha256()
    digest.update(scene.images.numpy().tobytes())
    digest.update(scene.camera_to_world.numpy().tobytes())
    intrinsics = [scene.focal, scene.center, scene.depth_range, scene.scale]
    knobs = {k: v for k, v in flatten(config).items() if k.startswith(_STAGE_KNOBS)}
    digest.update(json.dumps([intrinsics, knobs], sort_keys=True).encode())
    digest.update(_stage_code().encode())
    return digest.hexdigest()[:16]


def refiner_folder(storage: Path, config: Config, name: str, fields: Sequence[str]) -> Path:
    """The cache entry of a refiner of the scene `name`; `fields` are the keys of what it is made
    of: of the scene itself, then of the others that it is trained on instead, if any."""
    content = json.dumps([fields, flatten(config), _stage_code(_REFINER_CODE)], sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    return storage / "cache" / f"refiner-{name}-{key}"


@cache
def _stage_code(parts: tuple[str, ...] = _STAGE_CODE) -> str:
    package = Path(cbnerf.__file__).parent
    digest = hashlib.sha256()
    for part in parts:
        path = package / part
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()

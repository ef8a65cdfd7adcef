"""What determines a trained stage: scene, knobs, code and seed, as a hash that names it."""

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import cbnerf
from cbnerf.config import Config, flatten, flatten_field
from cbnerf.data.scene import Scene

# What stage 1 is made of; a change there makes old entries unreachable.
_STAGE_CODE = (
    "config.py",
    "downsampling.py",
    "rng.py",
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
_REFINER_CODE = (
    "codebook",
    "baselines",
    "data/patches.py",
    "data/references.py",
    "training/refiner.py",
)


def field_key(config: Config, scene: Scene) -> str:
    """Hash of photographs, cameras, the knobs of stage 1 and its code.

    Machines on which `auto` is not the same precision must not share an entry, so it is refused:
    see `settle_precision`.
    """
    if config.field.precision == "auto":
        raise ValueError("a key of stage 1 needs the precision really used, not `auto`")
    digest = hashlib.sha256()
    digest.update(scene.images.numpy().tobytes())
    digest.update(scene.camera_to_world.numpy().tobytes())
    intrinsics = [scene.focal, scene.center, scene.depth_range, scene.scale]
    digest.update(json.dumps([intrinsics, flatten_field(config)], sort_keys=True).encode())
    digest.update(_stage_code().encode())
    return digest.hexdigest()[:16]


def refiner_key(config: Config, fields: Sequence[str]) -> str:
    """Hash of all knobs, the code of both stages, and the `fields`, keys of what a refiner is made
    of: of the scene itself, then of the others that it is trained on instead, if any; or of all
    scenes that share it."""
    content = json.dumps([fields, flatten(config), _stage_code(_REFINER_CODE)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@cache
def _stage_code(parts: tuple[str, ...] = _STAGE_CODE) -> str:
    package = Path(cbnerf.__file__).parent
    digest = hashlib.sha256()
    for part in parts:
        path = package / part
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()

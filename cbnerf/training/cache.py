"""The stage-1 cache: a field is trained once per scene, configuration, code and seed.

An entry is a folder named by the hash of all that determines it.
`training.stages` says when it is finished.
"""

import hashlib
import json
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
_STAGE_KNOBS = ("data.", "field.", "seed")


def field_folder(storage: Path, config: Config, scene: Scene) -> Path:
    """The cache entry of a scene's field, finished or not."""
    return storage / "cache" / f"field-{scene.name}-{field_key(config, scene)}"


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


@cache
def _stage_code() -> str:
    package = Path(cbnerf.__file__).parent
    digest = hashlib.sha256()
    for part in _STAGE_CODE:
        path = package / part
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()

"""Scenes by name: LLFF folders where there are any, else the built-in scenes.

A built-in scene is drawn once and kept as an LLFF folder in the storage, one for each image width.
"""

import os
import shutil
from functools import lru_cache
from pathlib import Path

import torch
from filelock import FileLock

from cbnerf.config import DataConfig
from cbnerf.data.llff import find_scenes, read_capture, write_capture
from cbnerf.data.scene import Capture, Scene, make_scene
from cbnerf.files import whole
from cbnerf.scenes import BUILT_IN_SCENES, make_camera, make_world, place_cameras
from cbnerf.scenes.raycasting import render

DATA_VARIABLE = "CBNERF_DATA"
DEFAULT_DATA = Path("data/nerf_llff_data")
STORAGE_VARIABLE = "CBNERF_STORAGE"
NUM_VIEWS = 13
"""Default number of photographs of a built-in scene."""
_SUPERSAMPLING = 4
PAPER_SCENES = ("fern", "flower", "fortress", "horns", "leaves", "orchids", "room", "trex")


def default_storage() -> Path:
    """Where studies, trained stages and built-in scenes are kept if no folder is given."""
    return Path(os.environ.get(STORAGE_VARIABLE) or "runs")


def locate_data(data: Path | None) -> tuple[Path | None, list[str]]:
    """The folder of scenes and their names: `--data`, else the variable, else the usual places."""
    asked = data or (Path(os.environ[DATA_VARIABLE]) if os.environ.get(DATA_VARIABLE) else None)
    for folder in [asked] if asked else [DEFAULT_DATA, default_storage() / "data"]:
        if available := find_scenes(folder):
            return folder.resolve(), available
    if asked:
        raise ValueError(
            f"{asked}: no LLFF scenes; expected folders such as fern/poses_bounds.npy below it"
        )
    return None, list(BUILT_IN_SCENES)


def choose_scenes(wanted: str, available: list[str], folder: Path | None) -> tuple[str, ...]:
    """`all`, or names separated by commas; `all` of LLFF data means the paper's scenes found."""
    where = str(folder) if folder else "the built-in scenes"
    if wanted == "all":
        found = [scene for scene in PAPER_SCENES if scene in available] or available
        return tuple(found)
    chosen = [scene.strip() for scene in wanted.split(",") if scene.strip()]
    unknown = [scene for scene in chosen if scene not in available]
    if unknown or not chosen:
        raise ValueError(
            f"--scenes {wanted}: no scene {unknown[0] if unknown else ''!r} in {where}; "
            f"there are {', '.join(available)}"
        )
    return tuple(dict.fromkeys(chosen))


def scene_folder(name: str, data: Path | None, storage: Path, width: int) -> Path:
    """The LLFF folder of a scene; without `data` that of a built-in one."""
    return data / name if data else storage / f"scenes/{width}/{name}"


# Trials and comparisons meet the same few scenes again and again, and do not change them.
@lru_cache(maxsize=16)
def read_scene(name: str, data: Path | None, storage: Path, knobs: DataConfig) -> Scene:
    """A scene of the folder `data`; without one a built-in scene, drawn when first used."""
    folder = scene_folder(name, data, storage, knobs.width)
    if data is None and not (folder / "poses_bounds.npy").exists():
        _draw_once(name, folder, knobs.width)
    return make_scene(read_capture(folder, knobs.width), knobs)


def _draw_once(name: str, folder: Path, width: int) -> None:
    """Of several processes that need a built-in scene one draws it and the others wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{name}.lock")):
        if (folder / "poses_bounds.npy").exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        with whole(folder) as drawn:
            write_capture(drawn, make_capture(name, width=width))


def make_capture(name: str, *, width: int, num_views: int = NUM_VIEWS) -> Capture:
    """Ray-traced photographs of a built-in scene, 4:3, with exact cameras and bounds."""
    world = make_world(name)
    poses = place_cameras(num_views)
    cameras = [make_camera(pose, width) for pose in poses]
    views = [render(world, camera, _SUPERSAMPLING) for camera in cameras]
    return Capture(
        name=name,
        images=torch.stack([(view.rgb * 255).round().to(torch.uint8) for view in views]),
        camera_to_world=poses,
        focal=cameras[0].focal,
        bounds=torch.tensor([[0.98 * near, 1.02 * far] for near, far in (v.bounds for v in views)]),
    )

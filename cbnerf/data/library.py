"""Scenes by name: folders of photographs if there are any, else the built-in scenes.

A built-in scene is rendered once for each image width and kept as an LLFF folder in the storage.
"""

import csv
import os
import shutil
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

import torch
from filelock import FileLock

from cbnerf.config import DataConfig
from cbnerf.data.captures import find_photographs, find_scenes, is_scene_folder, read_capture
from cbnerf.data.lenses import Lens
from cbnerf.data.llff import POSES_FILE, write_capture
from cbnerf.data.scene import Capture, Scene, make_scene
from cbnerf.data.splits import check_views
from cbnerf.data.transforms import TRANSFORMS_FILE
from cbnerf.files import atomic_write, expand_home
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
    """The default folder for studies, trained stages and built-in scenes."""
    return expand_home(Path(os.environ.get(STORAGE_VARIABLE) or "runs"))


def locate_data(data: Path | None) -> tuple[Path | None, list[str]]:
    """The folder of scenes and their names: of `--data`, else of the environment variable, else of
    the default folders; None and the built-in scenes if there is none."""
    asked = data or (Path(os.environ[DATA_VARIABLE]) if os.environ.get(DATA_VARIABLE) else None)
    asked = expand_home(asked) if asked else None
    for place in [asked] if asked else [DEFAULT_DATA, default_storage() / "data"]:
        folder = _folder_of_scenes(place)
        if available := find_scenes(folder):
            return folder.resolve(), available
    if asked and is_scene_folder(asked):
        scene = asked.resolve()
        raise ValueError(
            f"{asked}: a scene, not a folder of scenes; give --data {scene.parent} "
            f"--scenes {scene.name}"
        )
    if asked:
        raise ValueError(
            f"{asked}: no scenes; expected folders with {POSES_FILE}, {TRANSFORMS_FILE} or "
            "sparse/0 below it"
        )
    return None, list(BUILT_IN_SCENES)


def _folder_of_scenes(place: Path) -> Path:
    """`place`, or the only folder in it that holds scenes: archives unpack into such a folder."""
    if not place.is_dir() or find_scenes(place):
        return place
    visible = (one for one in place.iterdir() if not one.name.startswith("."))
    inner = sorted(one for one in visible if find_scenes(one))
    if len(inner) > 1:
        raise ValueError(
            f"{place}: no scenes, but {', '.join(one.name for one in inner)} in it hold some; "
            "give one of them as --data"
        )
    return inner[0] if inner else place


def choose_scenes(wanted: str, available: list[str], folder: Path | None) -> tuple[str, ...]:
    """The scenes of `--scenes`: `all` (those of the paper first, in its order), or names separated
    by commas; a name with a comma is put in double quotes."""
    where = str(folder) if folder else "the built-in scenes"
    if "all" in available:
        raise ValueError(f"{where}: a scene cannot be called `all`, which means all; rename it")
    if wanted == "all":
        of_paper = [scene for scene in PAPER_SCENES if scene in available]
        return tuple(of_paper + [scene for scene in available if scene not in of_paper])
    chosen = _split_names(wanted, available)
    unknown = [scene for scene in chosen if scene not in available]
    if unknown or not chosen:
        raise ValueError(
            f"--scenes {wanted}: no scene {unknown[0] if unknown else ''!r} in {where}; "
            f"there are {', '.join(map(_quoted, available))}"
        )
    own = [scene for scene in chosen if folder is None and is_scene_folder(Path(scene))]
    if own:
        raise ValueError(
            f"--scenes {wanted}: {own[0]} is a folder of photographs here as well as a built-in "
            "scene; give --data . for the folder, or rename it"
        )
    return tuple(dict.fromkeys(chosen))


def _split_names(wanted: str, available: list[str]) -> list[str]:
    if wanted in available:  # a name with a comma
        return [wanted]
    return [name if name in available else name.strip()
            for name in split_list("--scenes", wanted) if name.strip()]  # fmt: skip


def split_list(flag: str, text: str) -> list[str]:
    """The values of a flag, separated by commas; one that holds a comma is in double quotes."""
    try:
        (values,) = csv.reader([text], skipinitialspace=True)
    except csv.Error as error:
        raise ValueError(f"{flag} {text!r}: {error}") from None
    return values


def _quoted(name: str) -> str:
    """A name as it is written in a list for `--scenes`."""
    return '"' + name.replace('"', '""') + '"' if {",", '"'} & set(name) else name


def check_scenes(
    names: Iterable[str], data: Path | None, knobs: DataConfig, spell: Callable[[str, int], str]
) -> dict[str, int]:
    """Number of views of each scene, after all checks that need no pixels.

    `spell` formats a knob and its value as the command takes it, for error messages.
    """
    views: dict[str, int] = {}
    for name in names:
        found = find_photographs(data / name, knobs.width) if data else None
        views[name] = len(found.files) if found else NUM_VIEWS
        check_views(views[name], knobs, str(data / name) if data else name, spell)
    return views


def describe_photographs(names: Iterable[str], data: Path | None, width: int) -> str:
    """The image folder that is read for each scene, in words."""
    if data is None:
        return "drawn: built-in scenes"
    return ", ".join(str(find_photographs(data / name, width)) for name in names)


def scene_folder(name: str, data: Path | None, storage: Path, width: int) -> Path:
    """The folder of a scene of `data`; without `data`, of a built-in scene."""
    return data / name if data else storage / f"scenes/{width}/{name}"


# Units and comparisons load the same few scenes repeatedly and do not change them.
@lru_cache(maxsize=16)
def load_scene(name: str, data: Path | None, storage: Path, knobs: DataConfig) -> Scene:
    """A scene of the folder `data`; without one a built-in scene, rendered once into `storage`."""
    folder = scene_folder(name, data, storage, knobs.width)
    if data is None and not (folder / POSES_FILE).exists():
        _draw_once(name, folder, knobs.width)
    return make_scene(read_capture(folder, knobs.width), knobs)


def _draw_once(name: str, folder: Path, width: int) -> None:
    """Render a built-in scene into its folder; concurrent requests block on a lock."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{name}.lock")):
        if (folder / POSES_FILE).exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        with atomic_write(folder) as drawn:
            write_capture(drawn, make_capture(name, width=width))


def make_capture(name: str, *, width: int, num_views: int = NUM_VIEWS) -> Capture:
    """Ray-traced photographs of a built-in scene, 4:3, with exact cameras and bounds."""
    world = make_world(name)
    poses = place_cameras(num_views)
    cameras = [make_camera(pose, width) for pose in poses]
    views = [render(world, camera, _SUPERSAMPLING) for camera in cameras]
    first = cameras[0]
    lens = Lens.centred(float(first.width), float(first.height), first.focal)
    return Capture(
        name=name,
        images=torch.stack([(view.rgb * 255).round().to(torch.uint8) for view in views]),
        camera_to_world=poses,
        intrinsics=torch.from_numpy(lens.matrix).repeat(num_views, 1),
        bounds=torch.tensor([[0.98 * near, 1.02 * far] for near, far in (v.bounds for v in views)]),
    )

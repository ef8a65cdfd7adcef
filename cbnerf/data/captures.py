"""Scene folders of all formats: photographs with their cameras.

The cameras are read from `poses_bounds.npy` (LLFF, NeX), `transforms.json` (nerfstudio,
instant-ngp) or a COLMAP model in `sparse/0`, whichever comes first; the photographs from `images`,
`images_4`, `images_504x378`, ...
"""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cbnerf.data import colmap, llff, transforms
from cbnerf.data.cameras import Registration, check_registration
from cbnerf.data.lenses import undistort, without_distortion
from cbnerf.data.photographs import (
    Photographs,
    describe_unread,
    find_photograph,
    is_turned,
    list_photographs,
    read_header,
    read_photograph,
)
from cbnerf.data.scene import Capture

_IMAGE_FOLDER = re.compile(r"images(_\d+(x\d+)?)?")
_ASPECT_TOLERANCE = 0.02
_READERS = {
    llff.POSES_FILE: llff.read_cameras,
    transforms.TRANSFORMS_FILE: transforms.read_cameras,
    **dict.fromkeys(colmap.MODEL_FOLDERS, colmap.read_cameras),
}


def find_scenes(root: Path) -> list[str]:
    """Names of the scene folders below `root`, sorted."""
    if not root.is_dir():
        return []
    visible = (one for one in root.iterdir() if not one.name.startswith("."))
    return sorted(one.name for one in visible if _cameras_of(one))


def is_scene_folder(folder: Path) -> bool:
    """Whether a folder is meant to be a scene, even if it is broken."""
    return bool(_cameras_of(folder) or _image_folders(folder))


def read_capture(folder: Path, width: int) -> Capture:
    """A scene at an image width, resized from the narrowest image folder that is wide enough."""
    cameras, photographs = _read_folder(folder, width)
    first = cameras.lenses[0]
    size = width, round(width * first.height / first.width)
    images = []
    for file, lens in zip(photographs.files, cameras.lenses, strict=True):
        photograph = undistort(read_photograph(file), lens)
        if photograph.size != size:
            photograph = photograph.resize(size, Image.Resampling.LANCZOS)
        images.append(np.asarray(photograph))
    lenses = [without_distortion(lens).resized(*size) for lens in cameras.lenses]
    return Capture(
        name=Path(os.path.abspath(folder)).name,  # also for `.`; a link keeps its name
        images=torch.from_numpy(np.stack(images)),
        camera_to_world=torch.from_numpy(cameras.camera_to_world).float(),
        intrinsics=torch.from_numpy(np.stack([lens.matrix for lens in lenses])),
        bounds=torch.from_numpy(cameras.bounds).float(),
    )


def find_photographs(folder: Path, width: int) -> Photographs:
    """The photographs that `read_capture` would read, after all checks that need no pixels."""
    return _read_folder(folder, width)[1]


def fingerprint(folder: Path, width: int) -> str:
    """Hash of the files that `read_capture` reads, independent of the path."""
    cameras, photographs = _read_folder(folder, width)
    digest = hashlib.sha256()
    for file in (*cameras.files, *photographs.files):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def _cameras_of(folder: Path) -> str | None:
    """The entry of a folder that its cameras are read from."""
    return next((entry for entry in _READERS if os.path.lexists(folder / entry)), None)


def _read_folder(folder: Path, width: int) -> tuple[Registration, Photographs]:
    entry = _cameras_of(folder)
    if entry is None:
        raise ValueError(
            f"{folder / llff.POSES_FILE}: no such file; a scene has one, or "
            f"{transforms.TRANSFORMS_FILE}, or a COLMAP model in {colmap.MODEL_FOLDERS[0]}"
        )
    cameras = _READERS[entry](folder / entry).sorted()
    check_registration(cameras)
    return cameras, _choose_photographs(folder, cameras, width)


def _image_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    named = (one for one in folder.iterdir() if _IMAGE_FOLDER.fullmatch(one.name))
    return sorted(one for one in named if one.is_dir())


def _choose_photographs(folder: Path, cameras: Registration, width: int) -> Photographs:
    """The photographs of the narrowest image folder that fits the cameras and is wide enough."""
    fitting: list[Photographs] = []
    misfits: list[str] = []
    for place, names in _candidates(folder, cameras):
        try:
            if files := _list_files(place, names, cameras):
                fitting.append(_check_photographs(files, cameras))
        except (ValueError, OSError) as error:
            misfits.append(str(error))
    wide_enough = [found for found in fitting if found.width >= width]
    if wide_enough:
        return min(wide_enough, key=lambda found: found.width)
    if fitting:
        largest = max(found.width for found in fitting)
        unfit = f" (that fit: {misfits[0]})" if misfits else ""
        raise ValueError(
            f"{folder}: asked for images {width} pixels wide, the largest are {largest}{unfit}; "
            "choose a smaller resolution"
        )
    if misfits:
        raise ValueError(misfits[0])
    raise ValueError(f"{folder}: no images found in images, images_N or images_WxH")


def _candidates(folder: Path, cameras: Registration) -> Iterator[tuple[Path, list[str] | None]]:
    """Folders that may hold the photographs, with their names in it if those are known."""
    if cameras.names is None:
        yield from ((images, None) for images in _image_folders(folder))
        return
    parts = [Path(name).parts for name in cameras.names]
    if all(_IMAGE_FOLDER.fullmatch(first) and rest for first, *rest in parts):
        below = [str(Path(*rest)) for _, *rest in parts]
        yield from ((images, below) for images in _image_folders(folder))
    else:
        yield folder, cameras.names


def _list_files(place: Path, names: list[str] | None, cameras: Registration) -> list[Path]:
    """The photograph of each camera; ValueError if it is missing."""
    if names is not None:
        return [find_photograph(place / name, cameras.files[0]) for name in names]
    files = list_photographs(place)
    if files and len(files) != len(cameras.lenses):
        raise ValueError(
            f"{place} has {len(files)} images{describe_unread(place)} but {cameras.files[0]} has "
            f"{len(cameras.lenses)} cameras; they must be as many, in the order of the file names"
        )
    return files


def _check_photographs(files: list[Path], cameras: Registration) -> Photographs:
    """ValueError unless all have one shape and one scale relative to their cameras."""
    sizes = [read_header(file) for file in files]
    source, first = cameras.files[0], cameras.lenses[0]
    share = sizes[0][0] / first.width
    for file, (width, height), lens in zip(files, sizes, cameras.lenses, strict=True):
        if abs(height / width - lens.height / lens.width) > _ASPECT_TOLERANCE:
            turned = "; by its EXIF orientation it is turned: save it upright"
            raise ValueError(
                f"{file}: {width}x{height} has another aspect than its camera in {source.name}, "
                f"{lens.width:g}x{lens.height:g}{turned if is_turned(file) else ''}"
            )
        if max(abs(width - share * lens.width), abs(height - share * lens.height)) >= 1:
            raise ValueError(
                f"{file}: {width}x{height}, but {files[0].name} is {sizes[0][0]}x{sizes[0][1]}; "
                f"all photographs must be as large as {source.name} says, or all shrunk alike"
            )
        if abs(lens.height / lens.width - first.height / first.width) > _ASPECT_TOLERANCE:
            raise ValueError(
                f"{file}: {width}x{height}, but {files[0].name} is {sizes[0][0]}x{sizes[0][1]}; "
                "the photographs of a scene must have one shape: leave the others out"
            )
    smallest = min(sizes)
    return Photographs(files, *smallest, cameras.note)

"""LLFF scene folders: `poses_bounds.npy` beside `images`, `images_4`, `images_504x378`, ...

A row of `poses_bounds.npy` is a 3 x 5 matrix [camera to world 3 x 4 | height, width, focal] and the
near and far depth. Its camera axes are (down, right, backwards); those of `Capture` are
(right, up, backwards).
"""

import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as iio
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image

from cbnerf.data.cameras import check_forward_facing, check_rotations
from cbnerf.data.photographs import (
    Photographs,
    describe_unread,
    is_turned,
    list_photographs,
    read_header,
    read_photograph,
)
from cbnerf.data.scene import Capture
from cbnerf.nerf.rays import centred_intrinsics

POSES_FILE = "poses_bounds.npy"
_IMAGE_FOLDER = re.compile(r"images(_\d+(x\d+)?)?")
# Relative, for height, width and focal: less than 0.1 pixels in a corner of 1008x756.
_INTRINSICS_TOLERANCE = 1e-4
_ASPECT_TOLERANCE = 0.02


def find_scenes(root: Path) -> list[str]:
    """Names of the scene folders below `root`, sorted."""
    if not root.is_dir():
        return []
    names = (file.parent.name for file in root.glob(f"*/{POSES_FILE}"))
    return sorted(name for name in names if not name.startswith("."))


def is_scene_folder(folder: Path) -> bool:
    """Whether a folder is meant to be a scene, even if it is broken."""
    return (folder / POSES_FILE).exists() or bool(_image_folders(folder))


def read_capture(folder: Path, width: int) -> Capture:
    """A scene at an image width, resized from the narrowest image folder that is wide enough."""
    cameras, photographs = _read_folder(folder, width)
    size = width, round(width * cameras.height / cameras.width)
    images = np.stack([_read_image(file, size) for file in photographs.files])
    return Capture(
        name=Path(os.path.abspath(folder)).name,  # also for `.`; a link keeps its name
        images=torch.from_numpy(images),
        camera_to_world=torch.from_numpy(cameras.poses).float(),
        intrinsics=centred_intrinsics(len(images), cameras.focal * width / cameras.width, *size),
        bounds=torch.from_numpy(cameras.bounds).float(),
    )


def find_photographs(folder: Path, width: int) -> Photographs:
    """The photographs that `read_capture` would read, after all checks that need no pixels."""
    return _read_folder(folder, width)[1]


def fingerprint(folder: Path, width: int) -> str:
    """Hash of the files that `read_capture` reads, independent of the path."""
    digest = hashlib.sha256()
    for file in (folder / POSES_FILE, *find_photographs(folder, width).files):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def write_capture(folder: Path, capture: Capture) -> None:
    """Write a capture as an LLFF scene folder that `read_capture` reads back.

    LLFF has one focal length for both axes, and the principal point in the middle of the image.
    """
    views, height, width, _ = capture.images.shape
    fx, fy, cx, cy = capture.intrinsics.T
    if not (fx.equal(fy) and (cx == width / 2).all() and (cy == height / 2).all()):
        raise ValueError(
            f"{folder}: LLFF holds one focal length and a centred principal point only"
        )
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for view, image in enumerate(capture.images.numpy()):
        iio.imwrite(folder / "images" / f"image{view:03d}.png", image)
    poses = capture.camera_to_world.double().numpy()
    right, up, backward, origin = np.moveaxis(poses, 2, 0)
    intrinsics = np.stack(np.broadcast_arrays(height, width, fx.numpy()), axis=1)
    matrices = np.stack([-up, right, backward, origin, intrinsics], axis=2)
    rows = np.concatenate([matrices.reshape(views, 15), capture.bounds.double().numpy()], axis=1)
    np.save(folder / POSES_FILE, rows)


class _Cameras(NamedTuple):
    """The content of `poses_bounds.npy`, in the axes of `Capture`."""

    poses: Float[np.ndarray, "views 3 4"]
    height: float
    width: float
    focal: float
    bounds: Float[np.ndarray, "views 2"]


def _read_folder(folder: Path, width: int) -> tuple[_Cameras, Photographs]:
    cameras = _read_cameras(folder / POSES_FILE)
    return cameras, _choose_photographs(folder, cameras, width)


def _read_cameras(file: Path) -> _Cameras:
    rows = _read_rows(file)
    matrices, bounds = rows[:, :15].reshape(-1, 3, 5), rows[:, 15:]
    with np.errstate(over="ignore", invalid="ignore"):  # Scenes are float32: 1e39 is not finite.
        finite = np.isfinite(rows.astype(np.float32).sum(axis=1))
    _check_rows(file, finite, "holds values that are not finite")
    in_order = (bounds[:, 0] > 0) & (bounds[:, 1] > bounds[:, 0])
    _check_rows(file, in_order, "its bounds must satisfy 0 < near < far")
    intrinsics = matrices[:, :, 4]
    _check_rows(file, intrinsics.min(axis=1) > 0, "height, width and focal must be positive")
    changes = np.abs(intrinsics / intrinsics[0] - 1).max(axis=1)
    _check_rows(
        file, changes <= _INTRINSICS_TOLERANCE,
        "has another height, width or focal length than row 0; all photographs must be of one "
        "camera (COLMAP: --ImageReader.single_camera 1)",
    )  # fmt: skip
    down, right, backward, origin = np.moveaxis(matrices[:, :, :4], 2, 0)
    poses = np.stack([right, -down, backward, origin], axis=2)
    check_rotations(poses[:, :, :3], file)
    height, width, focal = (float(value) for value in intrinsics[0])
    intrinsics = centred_intrinsics(len(poses), focal, width, height).numpy()
    check_forward_facing(poses, intrinsics, (height, width), file)
    return _Cameras(poses, height, width, focal, bounds)


def _read_rows(file: Path) -> Float[np.ndarray, "views 17"]:
    if not file.exists():
        raise ValueError(f"{file}: no such file; an LLFF scene folder has one")
    if not file.is_file():
        raise ValueError(f"{file}: not a file")
    try:
        with file.open("rb") as stream:
            rows = np.lib.format.read_array(stream, allow_pickle=False)
    except Exception as error:  # a damaged header can raise anything
        what = " ".join(str(error).split())
        raise ValueError(f"{file}: not a NumPy array file ({what})") from None
    if rows.ndim != 2 or rows.shape[1] != 17 or rows.dtype.kind not in "fiu":
        raise ValueError(
            f"{file}: expected N x 17 real numbers, found {rows.dtype} {rows.shape}; write it with "
            "LLFF's imgs2poses"
        )
    if not len(rows):
        raise ValueError(f"{file}: holds no cameras")
    return rows.astype(np.float64)


def _check_rows(file: Path, good: np.ndarray, problem: str) -> None:
    if not good.all():
        raise ValueError(f"{file}: row {int(good.argmin())} (counted from 0): {problem}")


def _image_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    named = (one for one in folder.iterdir() if _IMAGE_FOLDER.fullmatch(one.name))
    return sorted(one for one in named if one.is_dir())


def _choose_photographs(folder: Path, cameras: _Cameras, width: int) -> Photographs:
    """The narrowest image folder that fits the cameras and is at least `width` pixels wide."""
    fitting: list[Photographs] = []
    misfits: list[str] = []
    for images in _image_folders(folder):
        try:
            if files := list_photographs(images):
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


def _check_photographs(files: list[Path], cameras: _Cameras) -> Photographs:
    """ValueError unless there is one photograph per camera, all of one size and its aspect."""
    folder = files[0].parent
    if len(files) != len(cameras.poses):
        raise ValueError(
            f"{folder} has {len(files)} images{describe_unread(folder)} but "
            f"{folder.parent / POSES_FILE} has {len(cameras.poses)} cameras; they must be as many, "
            "in the order of the file names"
        )
    sizes = [read_header(file) for file in files]
    for file, (width, height) in zip(files, sizes, strict=True):
        if abs(height / width - cameras.height / cameras.width) > _ASPECT_TOLERANCE:
            turned = "; by its EXIF orientation it is turned: save it upright"
            raise ValueError(
                f"{file}: {width}x{height} has another aspect than its camera in {POSES_FILE}, "
                f"{cameras.width:g}x{cameras.height:g}{turned if is_turned(file) else ''}"
            )
        if (width, height) != sizes[0]:
            raise ValueError(
                f"{file}: {width}x{height}, but {files[0].name} is {sizes[0][0]}x{sizes[0][1]}; "
                "all photographs must have one size"
            )
    return Photographs(files, *sizes[0])


def _read_image(file: Path, size: tuple[int, int]) -> UInt8[np.ndarray, "height width 3"]:
    rgb = read_photograph(file)
    if rgb.size != size:
        rgb = rgb.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(rgb)

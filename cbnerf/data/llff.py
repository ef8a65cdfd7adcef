"""LLFF scene folders: `poses_bounds.npy` beside `images`, `images_4`, `images_8`, ...

A row of `poses_bounds.npy` is a 3 x 5 matrix [camera to world 3 x 4 | height, width, focal] and the
near and far depth. Its camera axes are (down, right, backwards); those of `Capture` are
(right, up, backwards).
"""

import hashlib
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image

from cbnerf.data.scene import Capture

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}


def find_scenes(root: Path) -> list[str]:
    """Names of the scene folders below `root`, sorted."""
    if not root.is_dir():
        return []
    return sorted(file.parent.name for file in root.glob("*/poses_bounds.npy"))


def read_capture(folder: Path, width: int) -> Capture:
    """Read a scene at the image width asked for, resized from the next larger image folder."""
    (poses, (camera_height, camera_width, focal), bounds), files = _read_folder(folder, width)
    height = round(width * camera_height / camera_width)
    images = np.stack([_read_image(file, width, height) for file in files])
    return Capture(
        name=folder.name,
        images=torch.from_numpy(images),
        camera_to_world=torch.from_numpy(poses).float(),
        focal=focal * width / camera_width,
        bounds=torch.from_numpy(bounds).float(),
    )


def count_views(folder: Path, width: int) -> int:
    """Number of views, after all checks that need no pixels."""
    return len(_read_folder(folder, width)[1])


def fingerprint(folder: Path, width: int) -> str:
    """Hash of the files that `read_capture` reads, wherever the folder lies."""
    _, images = _read_folder(folder, width)
    digest = hashlib.sha256()
    for file in (folder / "poses_bounds.npy", *images):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def write_capture(folder: Path, capture: Capture) -> None:
    """Write a capture as an LLFF scene folder that `read_capture` reads back."""
    views, height, width, _ = capture.images.shape
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for view, image in enumerate(capture.images.numpy()):
        iio.imwrite(folder / "images" / f"image{view:03d}.png", image)
    poses = capture.camera_to_world.double().numpy()
    right, up, backward, origin = np.moveaxis(poses, 2, 0)
    intrinsics = np.broadcast_to([height, width, capture.focal], (views, 3))
    matrices = np.stack([-up, right, backward, origin, intrinsics], axis=2)
    rows = np.concatenate([matrices.reshape(views, 15), capture.bounds.double().numpy()], axis=1)
    np.save(folder / "poses_bounds.npy", rows)


_Cameras = tuple[np.ndarray, tuple[float, float, float], np.ndarray]
"""Poses, (height, width, focal), bounds."""


def _read_folder(folder: Path, width: int) -> tuple[_Cameras, list[Path]]:
    cameras = _read_poses(folder / "poses_bounds.npy")
    files = _choose_images(folder, width)
    if len(files) != len(cameras[0]):
        raise ValueError(
            f"{files[0].parent} has {len(files)} images but {folder / 'poses_bounds.npy'} has "
            f"{len(cameras[0])} cameras; they must be as many, in the order of the file names"
        )
    return cameras, files


def _read_poses(file: Path) -> _Cameras:
    try:
        with file.open("rb") as stream:
            rows = np.lib.format.read_array(stream, allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file; an LLFF scene folder has one") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not a NumPy array file ({error})") from None
    if rows.ndim != 2 or rows.shape[1] != 17 or not np.issubdtype(rows.dtype, np.floating):
        raise ValueError(
            f"{file}: expected N x 17 floats, found {rows.dtype} {rows.shape}; "
            "write it with LLFF's imgs2poses"
        )
    if len(rows) < 3:
        raise ValueError(f"{file}: {len(rows)} cameras; a scene needs at least 3")
    if not np.isfinite(rows).all():
        raise ValueError(f"{file}: holds values that are not finite")
    matrices, bounds = rows[:, :15].reshape(-1, 3, 5), rows[:, 15:]
    if not ((bounds[:, 0] > 0) & (bounds[:, 1] > bounds[:, 0])).all():
        raise ValueError(f"{file}: bounds must satisfy 0 < near < far in every row")
    height, width, focal = (float(value) for value in matrices[0, :, 4])
    if min(height, width, focal) <= 0:
        raise ValueError(f"{file}: height, width and focal must be positive")
    down, right, backward, origin = np.moveaxis(matrices[:, :, :4], 2, 0)
    return np.stack([right, -down, backward, origin], axis=2), (height, width, focal), bounds


def _choose_images(folder: Path, width: int) -> list[Path]:
    """The files of the narrowest image folder that is at least `width` pixels wide."""
    widths: dict[int, list[Path]] = {}
    for images in sorted(path for path in folder.glob("images*") if path.is_dir()):
        files = sorted(f for f in images.iterdir() if f.suffix.lower() in _IMAGE_SUFFIXES)
        if files:
            widths[_image_width(files[0])] = files
    if not widths:
        raise ValueError(f"{folder}: no images found in images, images_4 or images_8")
    wide_enough = [found for found in widths if found >= width]
    if not wide_enough:
        raise ValueError(
            f"{folder}: asked for images {width} pixels wide, the largest are {max(widths)}; "
            "choose a smaller resolution"
        )
    return widths[min(wide_enough)]


def _image_width(file: Path) -> int:
    with _open(file) as image:
        return image.width


def _read_image(file: Path, width: int, height: int) -> np.ndarray:
    with _open(file) as image:
        if abs(image.height / image.width - height / width) > 0.02:
            raise ValueError(
                f"{file}: {image.width}x{image.height} has another aspect than its camera in "
                "poses_bounds.npy"
            )
        try:
            rgb = image.convert("RGB")
        except (OSError, SyntaxError) as error:  # Pillow's word for a bad PNG
            raise ValueError(f"{file}: broken image ({error})") from None
        if rgb.size != (width, height):
            rgb = rgb.resize((width, height), Image.Resampling.LANCZOS)
        return np.asarray(rgb)


def _open(file: Path) -> Image.Image:
    try:
        return Image.open(file)
    except OSError as error:
        raise ValueError(f"{file}: not an image ({error})") from None

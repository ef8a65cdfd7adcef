"""LLFF scene folders: `poses_bounds.npy` beside `images`, `images_4`, `images_504x378`, ...

A row of `poses_bounds.npy` is a 3 x 5 matrix [camera to world 3 x 4 | height, width, focal] and the
near and far depth. Its camera axes are (down, right, backwards); those of `Capture` are
(right, up, backwards). In NeX's variant the matrix is 3 x 4, and `hwf_cxcy.npy` holds height,
width, fx, fy, cx, cy of all cameras.
"""

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch

from cbnerf.data.cameras import Registration
from cbnerf.data.lenses import Lens
from cbnerf.data.scene import Capture

POSES_FILE = "poses_bounds.npy"
_NEX_LENS_FILE = "hwf_cxcy.npy"
_ROUNDING = 1e-6
"""In pixels."""


def read_cameras(file: Path) -> Registration:
    """The cameras of a `poses_bounds.npy`; ValueError where it is malformed."""
    rows = _read_array(file)
    if rows.ndim != 2 or rows.shape[1] not in (14, 17):
        raise ValueError(
            f"{file}: expected N x 17 real numbers (or N x 14 beside {_NEX_LENS_FILE}), found "
            f"{rows.shape}; write it with LLFF's imgs2poses"
        )
    matrices = rows[:, :-2].reshape(len(rows), 3, (rows.shape[1] - 2) // 3)
    down, right, backward, origin = np.moveaxis(matrices[:, :, :4], 2, 0)
    poses = np.stack([right, -down, backward, origin], axis=2)
    files = [file]
    if rows.shape[1] == 17:
        lenses = [Lens.centred(width, height, focal) for height, width, focal in matrices[:, :, 4]]
    else:
        files.append(file.with_name(_NEX_LENS_FILE))
        lenses = [_read_nex_lens(files[1])] * len(rows)
    return Registration(files, None, poses, lenses, rows[:, -2:])


def _read_nex_lens(file: Path) -> Lens:
    values = _read_array(file).ravel()
    if len(values) != 6:
        raise ValueError(f"{file}: expected 6 numbers (height, width, fx, fy, cx, cy)")
    height, width, fx, fy, cx, cy = values.tolist()
    return Lens(width, height, fx, fy, cx, cy)


def _read_array(file: Path) -> np.ndarray:
    """Real numbers of any type and byte order, as float64."""
    if not file.exists():
        raise ValueError(f"{file}: no such file")
    if not file.is_file():
        raise ValueError(f"{file}: not a file")
    try:
        with file.open("rb") as stream:
            array = np.lib.format.read_array(stream, allow_pickle=False)
    except Exception as error:  # a damaged header can raise anything
        what = " ".join(str(error).split())
        raise ValueError(f"{file}: not a NumPy array file ({what})") from None
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{file}: expected real numbers, found {array.dtype}")
    with np.errstate(over="ignore"):  # of a longer type
        return array.astype(np.float64)


def write_capture(folder: Path, capture: Capture, names: list[str] | None = None) -> None:
    """Write a capture as an LLFF scene folder that `read_capture` reads back.

    `names` are those of the photographs without suffix, in their order.

    LLFF has one focal length for both axes, and the principal point in the middle of the image.
    """
    views, height, width, _ = capture.images.shape
    fx, fy, cx, cy = capture.intrinsics.T
    off = torch.stack([fx - fy, cx - width / 2, cy - height / 2])
    if off.abs().max() > _ROUNDING:
        raise ValueError(
            f"{folder}: LLFF holds one focal length and a centred principal point only"
        )
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = names or [f"image{view:03d}" for view in range(views)]
    for name, image in zip(names, capture.images.numpy(), strict=True):
        iio.imwrite(folder / "images" / f"{name}.png", image)
    poses = capture.camera_to_world.double().numpy()
    right, up, backward, origin = np.moveaxis(poses, 2, 0)
    intrinsics = np.stack(np.broadcast_arrays(height, width, fx.numpy()), axis=1)
    matrices = np.stack([-up, right, backward, origin, intrinsics], axis=2)
    rows = np.concatenate([matrices.reshape(views, 15), capture.bounds.double().numpy()], axis=1)
    np.save(folder / POSES_FILE, rows)

"""`transforms.json` of nerfstudio and instant-ngp: one lens for all frames or one for each.

Camera axes are those of `Capture` (right, up, backwards). The file holds no depths.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from cbnerf.data.bounds import guess_bounds
from cbnerf.data.cameras import Registration
from cbnerf.data.lenses import Lens
from cbnerf.data.photographs import find_photograph, read_header

TRANSFORMS_FILE = "transforms.json"
_MODELS = {"PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV"}
_OTHER_DISTORTION = ("k4", "k5", "k6", "is_fisheye", "ftheta_p0", "lens_mode")


def read_cameras(file: Path) -> Registration:
    """The cameras of a `transforms.json`; ValueError where it is malformed."""
    content = _read_json(file)
    frames = content.get("frames")
    if not isinstance(frames, list) or not frames or not all(isinstance(f, dict) for f in frames):
        raise ValueError(f"{file}: holds no frames")
    names = [frame.get("file_path") for frame in frames]
    if not all(isinstance(name, str) and name.isprintable() and Path(name).name for name in names):
        raise ValueError(f"{file}: a frame without file_path")
    poses = np.stack(
        [
            _read_matrix(file, name, frame.get("transform_matrix"))
            for name, frame in zip(names, frames, strict=True)
        ]
    )
    if "applied_transform" in content:
        # What nerfstudio has done to the world; undone, in case that it mirrors.
        applied = _read_matrix(file, "applied_transform", content["applied_transform"])
        poses = _undo(applied, poses)
    lenses = [
        _read_lens(file, name, content | frame) for name, frame in zip(names, frames, strict=True)
    ]
    masked = any("mask_path" in frame for frame in frames)
    note = f"the masks in {file.name} are ignored" if masked else ""
    paths = [str(Path(name)) for name in names]  # without a leading `./`
    return Registration([file], paths, poses, lenses, guess_bounds(poses), note)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file}: not a file")
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds no frames")
    return content


def _read_matrix(file: Path, name: str, value: Any) -> Float[np.ndarray, "3 4"]:
    try:
        matrix = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        matrix = np.zeros(0)
    if matrix.shape not in ((4, 4), (3, 4)):
        raise ValueError(f"{file}: {name}: expected a matrix of 4 x 4 or 3 x 4 numbers")
    return matrix[:3]


def _undo(
    applied: Float[np.ndarray, "3 4"], poses: Float[np.ndarray, "views 3 4"]
) -> Float[np.ndarray, "views 3 4"]:
    rotation, shift = applied[:, :3], applied[:, 3:]
    moved = np.concatenate([poses[:, :, :3], poses[:, :, 3:] - shift], axis=2)
    return np.linalg.pinv(rotation) @ moved


def _read_lens(file: Path, name: str, values: dict[str, Any]) -> Lens:
    """The lens of a frame, whose values take precedence over those of the file."""

    def number(key: str, default: float = 0.0) -> float:
        value = values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{file}: {name}: {key} = {value!r} is no number")
        return float(value)

    model = values.get("camera_model", "OPENCV")
    if model not in _MODELS or any(values.get(key) for key in _OTHER_DISTORTION):
        raise ValueError(
            f"{file}: {name}: its lens ({model}) has a distortion that is not read; undistort the "
            "photographs, such as with COLMAP's image_undistorter"
        )
    if "w" in values and "h" in values:
        width, height = number("w"), number("h")
    else:
        width, height = read_header(find_photograph(file.parent / name, file))
    angle_x, angle_y = number("camera_angle_x"), number("camera_angle_y")
    fx = number("fl_x", width / 2 / math.tan(angle_x / 2) if angle_x else 0.0)
    fy = number("fl_y", height / 2 / math.tan(angle_y / 2) if angle_y else fx)
    if not fx:
        raise ValueError(f"{file}: {name}: neither fl_x nor camera_angle_x is given")
    return Lens(
        width, height, fx, fy, number("cx", width / 2), number("cy", height / 2),
        (number("k1"), number("k2"), number("p1"), number("p2"), number("k3")),
    )  # fmt: skip

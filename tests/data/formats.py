"""Writers of scene folders in the formats that the package reads and does not write."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import imageio.v3 as iio
import numpy as np
from scipy.spatial.transform import Rotation

from cbnerf.data.scene import Capture

OPENCV = 4
POINTS = 201


def write_images(folder: Path, capture: Capture) -> list[str]:
    """PNG files in `images`; returns their names."""
    (folder / "images").mkdir(parents=True)
    names = [f"image{view:03d}.png" for view in range(len(capture.images))]
    for name, image in zip(names, capture.images.numpy(), strict=True):
        iio.imwrite(folder / "images" / name, image)
    return names


def write_nex(folder: Path, capture: Capture) -> None:
    """N x 14 poses and one lens for all."""
    write_images(folder, capture)
    _, height, width, _ = capture.images.shape
    right, up, backward, origin = np.moveaxis(capture.camera_to_world.double().numpy(), 2, 0)
    matrices = np.stack([-up, right, backward, origin], axis=2).reshape(-1, 12)
    np.save(folder / "poses_bounds.npy", np.concatenate([matrices, capture.bounds], axis=1))
    np.save(folder / "hwf_cxcy.npy", np.array([[height, width, *capture.intrinsics[0]]]).T)


def write_transforms(folder: Path, capture: Capture, **more: Any) -> None:
    """The lens of the first view for all, others where they differ."""
    names = write_images(folder, capture)
    _, height, width, _ = capture.images.shape
    lenses = [
        dict(zip(("fl_x", "fl_y", "cx", "cy"), row, strict=True))
        for row in capture.intrinsics.tolist()
    ]
    frames = [
        {"file_path": f"./images/{name}", "transform_matrix": [*pose, [0.0, 0.0, 0.0, 1.0]]}
        | {key: value for key, value in lens.items() if value != lenses[0][key]}
        for name, pose, lens in zip(names, capture.camera_to_world.tolist(), lenses, strict=True)
    ]
    content = {"w": width, "h": height, **lenses[0], **more, "frames": frames[::-1]}
    (folder / "transforms.json").write_text(json.dumps(content), encoding="utf-8")


class Model(NamedTuple):
    """A COLMAP model as numbers."""

    lenses: list[tuple[int, int, int, list[float]]]
    """Model, width, height, parameters."""
    poses: list[tuple[list[float], str]]
    """Quaternion and translation of the world to the camera, and the image."""
    points: list[tuple[list[float], int]]
    """A place, and the image that it was matched in."""


def make_model(capture: Capture, names: list[str]) -> Model:
    """With points on the axis of each view, evenly between its bounds, and two outliers."""
    _, height, width, _ = capture.images.shape
    lenses = [(OPENCV, width, height, [*row, 0, 0, 0, 0]) for row in capture.intrinsics.tolist()]
    poses, points = [], []
    cameras = zip(capture.camera_to_world.double().numpy(), capture.bounds.tolist(), strict=True)
    for view, (pose, (near, far)) in enumerate(cameras):
        to_camera = (pose[:, :3] * [1, -1, -1]).T
        x, y, z, w = Rotation.from_matrix(to_camera).as_quat()
        poses.append(([w, x, y, z, *(-to_camera @ pose[:, 3])], names[view]))
        depths = [near / 50, *np.linspace(near, far, POINTS), far * 50]
        points += [((pose[:, 3] - depth * pose[:, 2]).tolist(), view) for depth in depths]
    return Model(lenses, poses, points)


def write_colmap_text(folder: Path, capture: Capture) -> None:
    model = make_model(capture, write_images(folder, capture))
    sparse = folder / "sparse" / "0"
    sparse.mkdir(parents=True)
    # Numbers are any, in any order; an image without matches has an empty line.
    cameras = [
        f"{7 + i} OPENCV {w} {h} {_words(values)}"
        for i, (_, w, h, values) in enumerate(model.lenses)
    ]
    images = [
        f"{30 + i} {_words(pose)} {7 + i} {name}\n{'1.5 2.5 3 4.5 5.5 -1' if i % 2 else ''}"
        for i, (pose, name) in enumerate(model.poses)
    ]
    points = [
        f"{i} {_words(place)} 1 2 3 0.5 {30 + view} 0"
        for i, (place, view) in enumerate(model.points)
    ]
    for name, lines in (("cameras", cameras), ("images", images[::-1]), ("points3D", points)):
        text = f"# {name}, as COLMAP writes them\n" + "".join(f"{line}\n" for line in lines)
        (sparse / f"{name}.txt").write_text(text, encoding="utf-8")


def _words(values: list[float]) -> str:
    return " ".join(map(repr, map(float, values)))


def write_colmap_binary(folder: Path, capture: Capture) -> None:
    model = make_model(capture, write_images(folder, capture))
    sparse = folder / "sparse" / "0"
    sparse.mkdir(parents=True)
    cameras = [struct.pack("<iiQQ8d", 7 + i, number, w, h, *values)
               for i, (number, w, h, values) in enumerate(model.lenses)]  # fmt: skip
    images = [
        struct.pack("<i7di", 30 + i, *pose, 7 + i) + name.encode() + b"\0"
        + struct.pack("<Q", i % 2) + struct.pack("<ddq", 1.5, 2.5, -1) * (i % 2)
        for i, (pose, name) in enumerate(model.poses)
    ]  # fmt: skip
    points = [struct.pack("<Q3d3BdQii", i, *place, 1, 2, 3, 0.5, 1, 30 + view, 0)
              for i, (place, view) in enumerate(model.points)]  # fmt: skip
    for name, rows in (("cameras", cameras), ("images", images[::-1]), ("points3D", points)):
        (sparse / f"{name}.bin").write_bytes(struct.pack("<Q", len(rows)) + b"".join(rows))


WRITERS: dict[str, Callable[[Path, Capture], None]] = {
    "NeX": write_nex,
    "transforms": write_transforms,
    "COLMAP, text": write_colmap_text,
    "COLMAP, binary": write_colmap_binary,
}

"""COLMAP's sparse models, binary or text: cameras, images and points3D.

Models of COLMAP 4 have rigs and frames as well; their `images` still hold the pose of each image.
COLMAP's cameras look along +z with y down. Depth bounds are percentiles of the points that a
photograph was matched in.
"""

import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from cbnerf.data.bounds import bounds_of_points
from cbnerf.data.cameras import Registration
from cbnerf.data.lenses import Lens

MODEL_FOLDERS = ("sparse/0", "sparse", "colmap/sparse/0")
_LENSES = {
    0: ("SIMPLE_PINHOLE", "f cx cy"),
    1: ("PINHOLE", "fx fy cx cy"),
    2: ("SIMPLE_RADIAL", "f cx cy k1"),
    3: ("RADIAL", "f cx cy k1 k2"),
    4: ("OPENCV", "fx fy cx cy k1 k2 p1 p2"),
}
"""Name and parameters of each lens model that is read, by its number."""


class _Image(NamedTuple):
    name: str
    lens: int
    rotation: Float[np.ndarray, "3 3"]
    """World to camera, like `shift`."""
    shift: Float[np.ndarray, "3"]


class _Point(NamedTuple):
    position: tuple[float, float, float]
    images: list[int]
    """Numbers of the images that it was matched in."""


def read_cameras(folder: Path) -> Registration:
    """The cameras of a model; ValueError where it is malformed."""
    suffix = ".bin" if (folder / "images.bin").exists() else ".txt"
    files = [folder / f"{name}{suffix}" for name in ("images", "cameras", "points3D")]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{missing[0]}: no such file; a COLMAP model has it")
    images_of, lenses_of, points_of = _BINARY if suffix == ".bin" else _TEXT
    images = _parse(files[0], images_of)
    lenses = _parse(files[1], lenses_of)
    points = _parse(files[2], points_of)
    unknown = [image.name for image in images.values() if image.lens not in lenses]
    if unknown:
        raise ValueError(f"{files[0]}: the camera of {unknown[0]} is not in {files[1].name}")
    if not images:
        raise ValueError(f"{files[0]}: holds no images")
    poses = np.stack([_to_capture(image) for image in images.values()])
    return Registration(
        files,
        [f"images/{image.name}" for image in images.values()],
        poses,
        [lenses[image.lens] for image in images.values()],
        bounds_of_points(poses, _points_of_images(points, images)),
    )


def _to_capture(image: _Image) -> Float[np.ndarray, "3 4"]:
    """Camera to world, with the axes right, up, backwards."""
    axes = image.rotation.T * [1, -1, -1]
    return np.concatenate([axes, -image.rotation.T @ image.shift[:, None]], axis=1)


def _points_of_images(
    points: Iterable[_Point], images: dict[int, _Image]
) -> list[Float[np.ndarray, "_ 3"]]:
    seen: dict[int, list[tuple[float, float, float]]] = defaultdict(list)
    for point in points:
        for image in point.images:
            seen[image].append(point.position)
    return [np.array(seen[image], dtype=np.float64).reshape(-1, 3) for image in images]


def _parse(file: Path, parse: Callable[[bytes], Any]) -> Any:
    content = file.read_bytes()
    try:
        return parse(content)
    except _UnknownLens as error:
        raise ValueError(f"{file}: {error}") from None
    except (struct.error, ValueError, IndexError, OverflowError) as error:
        raise ValueError(f"{file}: broken COLMAP model ({' '.join(str(error).split())})") from None


class _UnknownLens(ValueError):
    pass


def _make_lens(model: int | str, width: float, height: float, values: Iterable[float]) -> Lens:
    for number, (name, parameters) in _LENSES.items():
        if model in (number, name):
            held = dict(zip(parameters.split(), values, strict=True))
            fx, fy = held.get("fx", held.get("f", 0.0)), held.get("fy", held.get("f", 0.0))
            k1, k2, p1, p2 = (held.get(key, 0.0) for key in ("k1", "k2", "p1", "p2"))
            return Lens(width, height, fx, fy, held["cx"], held["cy"], (k1, k2, p1, p2, 0.0))
    raise _UnknownLens(
        f"a lens of the model {model} is not read, only "
        f"{', '.join(name for name, _ in _LENSES.values())}; undistort with COLMAP's "
        "image_undistorter"
    )


def _make_image(name: str, lens: int, pose: Iterable[float]) -> _Image:
    """From a quaternion (w, x, y, z) and a translation."""
    w, x, y, z, *shift = pose
    norm = w * w + x * x + y * y + z * z
    if not name.isprintable():
        raise ValueError(f"{name!r} is no name")
    if not norm > 0:
        raise ValueError(f"{name} has no rotation")
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return _Image(name, lens, np.eye(3) + 2 / norm * (w * cross + cross @ cross), np.array(shift))


class _Cursor:
    """Reads little-endian numbers from bytes, one after the other."""

    def __init__(self, content: bytes):
        self._content, self._offset = content, 0

    def take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{layout}", self._content, self._offset)
        self._offset += struct.calcsize(f"<{layout}")
        return values

    def text(self) -> str:
        end = self._content.index(b"\0", self._offset)
        start, self._offset = self._offset, end + 1
        return self._content[start:end].decode()

    def rows(self) -> Iterator[int]:
        """The row numbers 0, 1, ..., whose count is read first; ValueError if the file does not end
        after the last row."""
        (count,) = self.take("Q")
        yield from range(count)
        if self._offset != len(self._content):
            raise ValueError(f"ends at byte {len(self._content)} and not at {self._offset}")


def _binary_lenses(content: bytes) -> dict[int, Lens]:
    cursor, lenses = _Cursor(content), {}
    for _ in cursor.rows():
        number, model, width, height = cursor.take("iiQQ")
        size = len(_LENSES[model][1].split()) if model in _LENSES else 0
        values = cursor.take(f"{size}d")
        lenses[number] = _make_lens(model, float(width), float(height), values)
    return lenses


def _binary_images(content: bytes) -> dict[int, _Image]:
    cursor, images = _Cursor(content), {}
    for _ in cursor.rows():
        number, *pose, lens = cursor.take("i7di")
        images[number] = _make_image(cursor.text(), lens, pose)
        (matches,) = cursor.take("Q")
        cursor.take(f"{24 * matches}x")  # not used
    return images


def _binary_points(content: bytes) -> list[_Point]:
    cursor, points = _Cursor(content), []
    for _ in cursor.rows():
        _, x, y, z, _, _, _, _, matches = cursor.take("Q3d3BdQ")
        points.append(_Point((x, y, z), list(cursor.take(f"{2 * matches}i")[::2])))
    return points


def _lines(content: bytes) -> list[list[str]]:
    """Words of each line that is no comment."""
    return [line.split() for line in content.decode().splitlines() if not line.startswith("#")]


def _text_lenses(content: bytes) -> dict[int, Lens]:
    return {
        int(number): _make_lens(model, float(width), float(height), map(float, values))
        for number, model, width, height, *values in filter(None, _lines(content))
    }


def _text_images(content: bytes) -> dict[int, _Image]:
    lines = content.decode().splitlines()
    # Every other line holds the matches of an image, and may be empty.
    rows = [line.split(maxsplit=9) for line in lines if not line.startswith("#")][::2]
    return {
        int(number): _make_image(name.strip(), int(lens), map(float, pose))
        for number, *pose, lens, name in rows
    }


def _text_points(content: bytes) -> list[_Point]:
    return [
        _Point((float(x), float(y), float(z)), [int(image) for image in rest[4::2]])
        for _, x, y, z, *rest in filter(None, _lines(content))
    ]


_BINARY = _binary_images, _binary_lenses, _binary_points
_TEXT = _text_images, _text_lenses, _text_points

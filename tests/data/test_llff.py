import shutil
from collections.abc import Callable
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

from cbnerf.data.llff import count_views, find_scenes, fingerprint, read_capture, write_capture
from cbnerf.data.procedural import make_capture
from cbnerf.data.scene import Capture


@pytest.fixture
def folder(tiny_capture: Capture, tmp_path: Path) -> Path:
    """A scene folder with four photographs of 64x48 pixels."""
    views = slice(0, 4)
    capture = tiny_capture._replace(
        images=tiny_capture.images[views],
        camera_to_world=tiny_capture.camera_to_world[views],
        bounds=tiny_capture.bounds[views],
    )
    write_capture(tmp_path / "scene", capture)
    return tmp_path / "scene"


def test_a_written_scene_reads_back(folder: Path, tiny_capture: Capture):
    capture = read_capture(folder, 64)
    assert capture.name == "scene"
    assert torch.equal(capture.images, tiny_capture.images[:4])
    assert torch.equal(capture.camera_to_world, tiny_capture.camera_to_world[:4])
    assert torch.equal(capture.bounds, tiny_capture.bounds[:4])
    assert capture.focal == tiny_capture.focal
    assert count_views(folder, 64) == 4


def test_axes_of_the_file_are_down_right_backward(folder: Path):
    matrix = np.load(folder / "poses_bounds.npy")[0, :15].reshape(3, 5)
    pose = read_capture(folder, 64).camera_to_world[0].numpy()
    np.testing.assert_allclose(matrix[:, 0], -pose[:, 1])
    np.testing.assert_allclose(matrix[:, 1:4], pose[:, [0, 2, 3]])
    assert matrix[:2, 4].tolist() == [48, 64]


def add_images(folder: Path, name: str, width: int, color: tuple[int, int, int]) -> None:
    """One-coloured copies of the photographs."""
    (folder / name).mkdir()
    for file in (folder / "images").iterdir():
        Image.new("RGB", (width, width * 3 // 4), color).save(folder / name / file.name)


def test_the_narrowest_sufficient_folder_is_read(folder: Path):
    add_images(folder, "images_4", 32, (255, 0, 0))
    add_images(folder, "images_8", 16, (0, 0, 255))
    for width, color in ((32, [255, 0, 0]), (20, [255, 0, 0]), (16, [0, 0, 255])):
        images = read_capture(folder, width).images
        assert images.shape[1:] == (width * 3 // 4, width, 3)
        assert images.reshape(-1, 3).unique(dim=0).tolist() == [color]
    assert read_capture(folder, 33).images.float().std() > 10


def test_focal_scales_with_the_width_and_resizing_keeps_the_picture(folder: Path):
    full, half = read_capture(folder, 64), read_capture(folder, 32)
    assert half.focal == pytest.approx(full.focal / 2)
    box = full.images.float().unflatten(1, (24, 2)).unflatten(3, (32, 2)).mean((2, 4))
    assert (half.images.float() - box).abs().mean() < 0.2 * box.std()


def test_what_is_no_image_folder_is_passed_over(folder: Path):
    (folder / "images.zip").write_bytes(b"PK")
    (folder / "images_2").mkdir()
    (folder / "images" / "Thumbs.db").write_bytes(b"")
    assert count_views(folder, 64) == 4


def test_scenes_are_found_by_their_cameras(folder: Path):
    (folder.parent / "other").mkdir()
    assert find_scenes(folder.parent) == ["scene"]
    assert find_scenes(folder / "none") == []


def change_rows(change: Callable[[np.ndarray], np.ndarray | None]) -> Callable[[Path], None]:
    """Rewrite `poses_bounds.npy`, in place or with what `change` returns."""

    def rewrite(folder: Path) -> None:
        rows = np.load(folder / "poses_bounds.npy")
        changed = change(rows)
        np.save(folder / "poses_bounds.npy", rows if changed is None else changed)

    return rewrite


def put(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "poses_bounds.npy").write_bytes(content) and None


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size]) and None


def save_archive(folder: Path) -> None:
    rows = np.load(folder / "poses_bounds.npy")
    with open(folder / "poses_bounds.npy", "wb") as file:
        np.savez(file, rows=rows)


def set_to(row: int, column: int, value: float) -> Callable[[Path], None]:
    return change_rows(lambda rows: rows.__setitem__((row, column), value))


def shear(folder: Path) -> None:
    file = folder / "images" / "image001.png"
    iio.imwrite(file, iio.imread(file)[:24])


MALFORMED = {
    "no cameras": (lambda f: (f / "poses_bounds.npy").unlink(), "poses_bounds.npy: no such file"),
    "cameras are a folder": (
        lambda f: [(f / "poses_bounds.npy").unlink(), (f / "poses_bounds.npy").mkdir()],
        "poses_bounds.npy: not a NumPy",
    ),
    "empty file": (put(b""), "poses_bounds.npy: not a NumPy array file"),
    "text": (put(b"1 2 3\n"), "poses_bounds.npy: not a NumPy array file"),
    "broken archive": (put(b"PK\x03\x04..."), "poses_bounds.npy: not a NumPy array file"),
    "archive": (save_archive, "poses_bounds.npy: not a NumPy array file"),
    "cut off": (truncate("poses_bounds.npy", 200), "poses_bounds.npy: not a NumPy array file"),
    "pickled": (
        change_rows(lambda rows: np.array([{"a": 1}], dtype=object)),
        "poses_bounds.npy: not a NumPy array file",
    ),
    "16 columns": (change_rows(lambda rows: rows[:, 1:]), r"expected N x 17 .* \(4, 16\)"),
    "integers": (change_rows(lambda rows: rows.astype(int)), "expected N x 17 floats, found int64"),
    "two cameras": (change_rows(lambda rows: rows[:2]), "2 cameras; a scene needs at least 3"),
    "NaN": (set_to(1, 3, np.nan), "poses_bounds.npy: holds values that are not finite"),
    "far before near": (set_to(2, 16, 0.01), "poses_bounds.npy: bounds must satisfy"),
    "behind the camera": (set_to(0, 15, -1.0), "poses_bounds.npy: bounds must satisfy"),
    "no focal": (set_to(0, 14, 0.0), "poses_bounds.npy: height, width and focal must be positive"),
    "image missing": (
        lambda f: (f / "images" / "image002.png").unlink(),
        "images has 3 images but .*poses_bounds.npy has 4 cameras",
    ),
    "no images": (lambda f: shutil.rmtree(f / "images"), "scene: no images found"),
    "too small": (lambda f: None, "asked for images 65 pixels wide, the largest are 64"),
    "first is no image": (
        lambda f: (f / "images" / "image000.png").write_bytes(b"no"), "image000.png: not an image"
    ),
    "one is no image": (
        lambda f: (f / "images" / "image002.png").write_bytes(b"no"), "image002.png: not an image"
    ),
    "one is cut off": (truncate("images/image002.png", 900), "image002.png: broken image"),
    "other aspect": (shear, "image001.png: 64x24 has another aspect than its camera"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_folder_is_told_in_one_line(case: str, folder: Path):
    damage, message = MALFORMED[case]
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        read_capture(folder, 65 if case == "too small" else 64)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_damage_to_an_image_goes_unnamed(folder: Path):
    file = folder / "images" / "image001.png"
    whole = file.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in generator.integers(0, len(whole), 4):
            damaged[place] ^= 1 << generator.integers(8)
        file.write_bytes(damaged)
        try:
            read_capture(folder, 64)
        except ValueError as error:
            assert "image001.png" in str(error)


def test_the_fingerprint_is_of_what_is_read_and_not_of_where_it_lies(tmp_path: Path):
    write_capture(tmp_path / "here" / "fern", make_capture("mosaic", width=64, num_views=4))
    here = fingerprint(tmp_path / "here" / "fern", 64)
    (tmp_path / "here").rename(tmp_path / "there")
    scene = tmp_path / "there" / "fern"
    assert fingerprint(scene, 64) == here
    (scene / "notes.txt").touch()
    assert fingerprint(scene, 64) == here
    for file in (scene / "images" / "image003.png", scene / "poses_bounds.npy"):
        kept = file.read_bytes()
        file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        assert fingerprint(scene, 64) != here
        file.write_bytes(kept)
    assert fingerprint(scene, 64) == here

import shutil
from collections.abc import Callable
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from cbnerf.data.captures import find_photographs, find_scenes, fingerprint, read_capture
from cbnerf.data.library import make_capture
from cbnerf.data.llff import write_capture
from cbnerf.data.scene import Capture


@pytest.fixture
def folder(tiny_capture: Capture, tmp_path: Path) -> Path:
    """A scene folder with four photographs of 64x48 pixels."""
    views = slice(0, 4)
    capture = tiny_capture._replace(
        images=tiny_capture.images[views],
        camera_to_world=tiny_capture.camera_to_world[views],
        intrinsics=tiny_capture.intrinsics[views],
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
    assert torch.equal(capture.intrinsics, tiny_capture.intrinsics[:4])
    assert len(find_photographs(folder, 64).files) == 4


@pytest.mark.parametrize("kind", ["i1", "<i4", ">i8", "f2", ">f2", ">f4", ">f8", "longdouble"])
def test_numbers_of_any_type_and_byte_order_are_read(folder: Path, kind: str):
    """Of four cameras in a row, which are exact in all types."""
    rows = np.array([[0, 1, 0, x, 6, -1, 0, 0, 0, 8, 0, 0, 1, 0, 9, 2, 7] for x in range(4)])
    rows[:, :15].reshape(4, 3, 5)[:, :, 4] = [48, 64, 99]
    np.save(folder / "poses_bounds.npy", rows.astype(kind))
    capture = read_capture(folder, 64)
    assert capture.camera_to_world[:, 0, 3].tolist() == [0, 1, 2, 3]
    assert capture.intrinsics[0].tolist() == [99, 99, 32, 24]
    assert capture.bounds[0].tolist() == [2, 7]


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


@pytest.mark.parametrize(
    "name", ["images_masks", "images2", "images_4_old", "images-4", "imagesLR"]
)
def test_only_folders_of_photographs_are_read(folder: Path, name: str):
    add_images(folder, name, 32, (255, 0, 0))
    assert str(find_photographs(folder, 32)) == "scene/images (64x48)"
    shutil.rmtree(folder / "images")
    with pytest.raises(ValueError, match="no images found"):
        find_photographs(folder, 32)


def test_a_folder_that_fits_is_preferred(folder: Path):
    add_images(folder, "images_32x24", 32, (255, 0, 0))
    assert str(find_photographs(folder, 32)) == "scene/images_32x24 (32x24)"
    (folder / "images_32x24" / "image002.png").unlink()
    assert str(find_photographs(folder, 32)) == "scene/images (64x48)"
    shutil.rmtree(folder / "images_32x24")
    add_images(folder, "images_2", 32, (255, 0, 0))
    Image.new("RGB", (32, 20)).save(folder / "images_2" / "image001.png")
    assert str(find_photographs(folder, 32)) == "scene/images (64x48)"
    with pytest.raises(ValueError, match=r"the largest are 64 \(that fit: .*image001.png: 32x20"):
        find_photographs(folder, 65)


def test_other_suffixes_and_hidden_files(folder: Path):
    expected = read_capture(folder, 64).images
    (folder / "images" / "._image000.png").write_bytes(b"of a Mac's disk")
    for index, suffix in enumerate(("webp", "TIFF", "bmp", "tif")):
        file = folder / "images" / f"image{index:03d}.png"
        kind = {"webp": "WEBP", "bmp": "BMP"}.get(suffix, "TIFF")
        with Image.open(file) as image:
            image.save(file.with_suffix(f".{suffix}"), kind, lossless=True)
        file.unlink()
    assert torch.equal(read_capture(folder, 64).images, expected)


def test_suffixes_that_cannot_be_read_are_named(folder: Path):
    for file in (folder / "images").iterdir():
        file.rename(file.with_suffix(".HEIC"))
    with pytest.raises(ValueError, match=r"images: no photograph .* only .heic \(4\)") as error:
        find_photographs(folder, 64)
    assert "HEIC by `cbnerf import` only" in str(error.value)


def test_a_photograph_is_read_as_it_is_stored(folder: Path):
    """COLMAP, which found the poses, ignores the EXIF orientation."""
    expected = read_capture(folder, 64).images
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    file = folder / "images" / "image001.png"
    with Image.open(file) as image:
        image.save(file, exif=turned)
        portrait = image.transpose(Image.Transpose.ROTATE_90)
    assert torch.equal(read_capture(folder, 64).images, expected)
    portrait.save(file, exif=turned)
    with pytest.raises(
        ValueError, match="48x64 has another aspect .* EXIF orientation it is turned"
    ):
        read_capture(folder, 64)


def test_small_differences_of_cameras_are_those_of_files(folder: Path):
    """float32, big-endian and Fortran order hold the same cameras."""
    before = read_capture(folder, 64)
    rows = np.load(folder / "poses_bounds.npy")
    for same in (rows.astype(np.float32), rows.astype(">f8"), np.asfortranarray(rows)):
        np.save(folder / "poses_bounds.npy", same)
        torch.testing.assert_close(read_capture(folder, 64).camera_to_world, before.camera_to_world)


def test_the_current_folder_has_a_name(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    assert read_capture(Path(), 64).name == "scene"


def test_focal_scales_with_the_width_and_resizing_keeps_the_picture(folder: Path):
    full, half = read_capture(folder, 64), read_capture(folder, 32)
    torch.testing.assert_close(half.intrinsics, full.intrinsics / 2)
    box = full.images.float().unflatten(1, (24, 2)).unflatten(3, (32, 2)).mean((2, 4))
    assert (half.images.float() - box).abs().mean() < 0.2 * box.std()


def test_other_entries_beside_image_folders_are_ignored(folder: Path):
    (folder / "images.zip").write_bytes(b"PK")
    (folder / "images_2").mkdir()
    (folder / "images" / "Thumbs.db").write_bytes(b"")
    assert len(find_photographs(folder, 64).files) == 4


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


@change_rows
def mirror(rows: np.ndarray) -> None:
    """Turn the x axis of the world round, as a mistaken change of axes does."""
    rows.reshape(-1, 17)[:, :5] *= [-1, -1, -1, -1, 1]


def scale(factor: float) -> Callable[[Path], None]:
    """Of the rotation in row 2."""

    def change(rows: np.ndarray) -> None:
        rows[2, :15].reshape(3, 5)[:, :3] *= factor

    return change_rows(change)


@change_rows
def ring(rows: np.ndarray) -> None:
    """Four cameras around their subject."""
    for row, turn in zip(rows, range(4), strict=True):
        sine, cosine = np.sin(turn * np.pi / 2), np.cos(turn * np.pi / 2)
        matrix = np.array([[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]])
        row[:15].reshape(3, 5)[:, :3] = matrix @ [[0, 1, 0], [-1, 0, 0], [0, 0, 1]]


def shear(folder: Path) -> None:
    file = folder / "images" / "image001.png"
    iio.imwrite(file, iio.imread(file)[:24])


MALFORMED = {
    "no cameras": (lambda f: (f / "poses_bounds.npy").unlink(), "poses_bounds.npy: no such file"),
    "cameras are a folder": (
        lambda f: [(f / "poses_bounds.npy").unlink(), (f / "poses_bounds.npy").mkdir()],
        "poses_bounds.npy: not a file",
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
    "complex": (change_rows(lambda rows: rows.astype(complex)), "real numbers, found complex128"),
    "rotations cut to integers": (
        change_rows(lambda rows: np.concatenate([rows[:, :15].astype(int), rows[:, 15:]], axis=1)),
        "poses_bounds.npy: the pose of row 0 .* is no rotation",
    ),
    "no rows": (change_rows(lambda rows: rows[:0]), "poses_bounds.npy: holds no cameras"),
    "NaN": (set_to(1, 3, np.nan), r"poses_bounds.npy: row 1 \(counted from 0\): .* not finite"),
    "too large": (set_to(1, 3, 1e39), r"poses_bounds.npy: row 1 .* not finite"),
    "far before near": (set_to(2, 16, 0.01), "poses_bounds.npy: row 2 .*bounds must satisfy"),
    "behind the camera": (set_to(0, 15, -1.0), "poses_bounds.npy: row 0 .*bounds must satisfy"),
    "no focal": (set_to(0, 14, 0.0), "poses_bounds.npy: row 0 .* focal must be positive"),
    "another size": (
        set_to(2, 9, 63),
        "image002.png: 64x48, but image000.png is 64x48; all .* as large as poses_bounds.npy says",
    ),
    "a telescope": (set_to(1, 14, 1e5), "poses_bounds.npy: row 1 .* sees less than 1 degree"),
    "a wide lens": (set_to(3, 14, 5), "poses_bounds.npy: the camera of row 3 .* as far as 8"),
    "mirrored": (mirror, r"poses_bounds.npy: the pose of row 0 \(counted from 0\) mirrors space"),
    "scaled": (scale(1.01), "poses_bounds.npy: the pose of row 2 .* lengths 1.01, 1.01, 1.01"),
    "all zero": (scale(0), "poses_bounds.npy: the pose of row 2 .* lengths 0, 0, 0"),
    "huge": (scale(1e30), r"poses_bounds.npy: the pose of row 2 .* lengths 1e\+30"),
    "a ring of cameras": (
        ring, r"poses_bounds.npy: the camera of row \d .* looks 90 degrees beside the average"
    ),
    "image missing": (
        lambda f: (f / "images" / "image002.png").unlink(),
        "images has 3 images but .*poses_bounds.npy has 4 cameras",
    ),
    "no images": (
        lambda f: shutil.rmtree(f / "images"),
        "scene: no images found in images, images_N or images_WxH",
    ),
    "too small": (lambda f: None, "asked for images 65 pixels wide, the largest are 64"),
    "first is no image": (
        lambda f: (f / "images" / "image000.png").write_bytes(b"no"), "image000.png: not an image"
    ),
    "one is no image": (
        lambda f: (f / "images" / "image002.png").write_bytes(b"no"), "image002.png: not an image"
    ),
    "one is cut off": (truncate("images/image002.png", 900), "image002.png: broken image"),
    "other aspect": (shear, "image001.png: 64x24 has another aspect than its camera"),
    "other size": (
        lambda f: Image.new("RGB", (32, 24)).save(f / "images" / "image003.png"),
        "image003.png: 32x24, but image000.png is 64x48",
    ),
    "another kind of file": (
        lambda f: (f / "images" / "image003.png").rename(f / "images" / "image003.heic"),
        r"images has 3 images \(not read: .heic \(1\)\) but .* has 4 cameras",
    ),
    "a link to nothing": (
        lambda f: [(f / "images" / "image003.png").unlink(),
                   (f / "images" / "image003.png").symlink_to("nowhere")],
        "image003.png: not a file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_folder_is_refused_in_one_line(case: str, folder: Path):
    damage, message = MALFORMED[case]
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        read_capture(folder, 65 if case == "too small" else 64)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_any_damage_to_an_image_names_the_file(folder: Path):
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

"""Import of photographs. What needs pycolmap is skipped where that is absent."""

import math
import os
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from drawings import draw
from PIL import ExifTags, Image, ImageFilter

from cbnerf.cli import main
from cbnerf.data import importing
from cbnerf.data.cameras import Registration
from cbnerf.data.captures import read_capture
from cbnerf.data.importing import Prepared, import_photographs
from cbnerf.data.lenses import Lens
from cbnerf.data.photographs import _TURNS, read_focal, read_upright
from cbnerf.data.scene import recenter
from cbnerf.data.structure_from_motion import Reconstruction
from cbnerf.data.video_frames import write_sharp_frames

ROOT = Path(__file__).parents[2]
LLFF = Path(os.environ.get("CBNERF_SHARED", "../shared")).resolve() / "llff"
LENS = Lens.centred(64.0, 48.0, 60.0)
needs_pycolmap = pytest.mark.skipif(
    find_spec("pycolmap") is None, reason="pycolmap is not installed"
)
INVERSE = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270,
           3: Image.Transpose.ROTATE_180}  # fmt: skip


def save_as_of_a_phone(image: Image.Image, file: Path, orientation: int, focal: float) -> None:
    """Turned as the sensor was held; `focal` is that of 35 mm film."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.FocalLengthIn35mmFilm] = round(focal)
    turn = INVERSE.get(orientation)
    stored = image if turn is None else image.transpose(turn)
    stored.save(file, quality=95, exif=exif.tobytes())


def take_photographs(folder: Path, number: int, size: tuple[int, int] = (64, 48)) -> Path:
    folder.mkdir()
    for view in range(number):
        noise = np.random.default_rng(view).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{view}.png")
    return folder


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_photographs_are_turned_upright(orientation: int, suffix: str, tmp_path: Path):
    """Against Pillow's own function."""
    from PIL import ImageOps

    ramp = np.linspace(0, 255, 48 * 32).reshape(48, 32).astype(np.uint8)
    exif, file = Image.Exif(), tmp_path / f"image.{suffix}"
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(ramp).convert("RGB").save(file, exif=exif)
    with Image.open(file) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(read_upright(file)), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_heic_photographs_are_turned_upright_once(orientation: int, tmp_path: Path):
    """Pillow-heif turns pixels itself when it reads them."""
    pytest.importorskip("pillow_heif").register_heif_opener()
    ramp = Image.fromarray(np.linspace(0, 255, 96 * 64).reshape(96, 64).astype(np.uint8))
    exif, file = Image.Exif(), tmp_path / "image.heic"
    exif[ExifTags.Base.Orientation] = orientation
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.FocalLengthIn35mmFilm] = 26
    ramp.convert("RGB").save(file, exif=exif.tobytes(), quality=95)
    turn = _TURNS.get(orientation)
    expected = np.asarray(ramp if turn is None else ramp.transpose(turn), dtype=int)
    upright = np.asarray(read_upright(file), dtype=int)
    assert upright.shape == (*expected.shape, 3)
    assert np.abs(upright - expected[..., None]).max() < 10
    assert read_focal(file) == 26 / 36


def test_the_focal_length_is_that_of_exif(tmp_path: Path):
    file = tmp_path / "image.jpg"
    save_as_of_a_phone(Image.new("RGB", (64, 48)), file, 1, 27)
    assert read_focal(file) == 27 / 36
    Image.new("RGB", (64, 48)).save(file)
    assert read_focal(file) is None


def reconstruct_without_colmap(
    angles: list[float], parallax: float = 5.0, names: list[str] | None = None
) -> Reconstruction:
    """Cameras in one place, turned to the side by these degrees."""
    poses = np.zeros((len(angles), 3, 4))
    for pose, angle in zip(poses, np.radians(angles), strict=True):
        pose[:, :3] = [[math.cos(angle), 0, math.sin(angle)], [0, 1, 0],
                       [-math.sin(angle), 0, math.cos(angle)]]  # fmt: skip
    names = names or [f"images/{view}.png" for view in range(len(angles))]
    cameras = Registration(
        [Path("images.bin")],
        names,
        poses,
        [LENS] * len(angles),
        np.tile([1.0, 2.0], (len(angles), 1)),
    )
    return Reconstruction(cameras, 999, 0.5, parallax)


def prepared(number: int) -> Prepared:
    return Prepared({f"{view}.png": f"{view}.jpg" for view in range(number)}, {}, ["3.jpg"])


POOR = {
    "no match": (None, 9, "no two photographs have both enough matches"),
    "few placed": (reconstruct_without_colmap([0] * 6), 11, "only 6 of 11 photographs"),
    "turned on the spot": (
        reconstruct_without_colmap([0] * 6, parallax=0.8), 6, "too little parallax, 0.8 degrees"
    ),
    "half around": (
        reconstruct_without_colmap([0, 0, 0, 5, -5, 5, -5, 80]), 8,
        "not forward-facing: 1 of 8 photographs see farther than 75 degrees .* as far as 100",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", POOR)
def test_a_poor_capture_is_refused_with_its_figure_and_the_remedy(case: str):
    found, total, message = POOR[case]
    with pytest.raises(ValueError, match=message) as error:
        importing._check(Path("photos"), prepared(total), found, force=False)
    assert str(error.value).startswith("photos: ") and "\n" not in str(error.value)
    assert "photograph from one side" in str(error.value) or importing.ADVICE in str(error.value)
    if found is not None:
        assert "--force" in str(error.value)
        importing._check(Path("photos"), prepared(total), found, force=True)


@pytest.mark.parametrize("force", [False, True])
def test_four_cameras_are_too_few_with_force_as_well(force: bool):
    found = reconstruct_without_colmap([0] * 4)
    with pytest.raises(ValueError, match="only 4 of 6 photographs have enough") as error:
        importing._check(Path("photos"), prepared(6), found, force=force)
    assert "--force" not in str(error.value)


def test_force_leaves_out_views_beyond_the_angle_and_reports_them():
    found = reconstruct_without_colmap([0, 0, 0, 5, -5, 5, -5, 80])
    kept = importing._check(Path("photos"), prepared(9), found, force=True)
    assert kept.cameras.names == found.cameras.names[:7]
    note = importing._describe(Path("photos"), prepared(9), kept)
    assert note.startswith("7 of 9 photographs of photos, 64x48")
    assert "left out, without enough matches or too far to the side: 7.jpg, 8.jpg\n" in note
    assert "blurred, better taken again: 3.jpg\n" in note


def test_mistakes_are_reported_before_anything_is_written(tmp_path: Path, capsys, monkeypatch):
    few = take_photographs(tmp_path / "few", 4)
    mixed = take_photographs(tmp_path / "mixed", 6)
    with Image.open(mixed / "3.png") as image:
        image.rotate(90, expand=True).save(mixed / "3.png")
    (tmp_path / "full" / "images").mkdir(parents=True)
    monkeypatch.setattr(importing, "check_pycolmap", lambda: None)
    for arguments, message in (
        ([str(few)], "few: 4 photographs are too few; take 20 to 60 pictures"),
        ([str(mixed)], "mixed: 1 of 6 photographs are not 64x48 as most (3.png)"),
        ([str(tmp_path / "none")], "none: no such folder of photographs"),
        ([str(few), "--width=1"], "--width must be at least 16"),
        ([str(few), f"--output={tmp_path}/full"], "full: is there already"),
        ([str(few / "0.png"), "--from-video"], "0.png: not a video"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["import", f"--output={tmp_path}/new", *arguments])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


@pytest.mark.skipif(find_spec("pycolmap") is not None, reason="pycolmap is installed")
def test_the_extra_is_named_where_it_is_missing(tmp_path: Path):
    with pytest.raises(ValueError, match=r"pip install 'cbnerf\[photos\]'"):
        import_photographs(
            tmp_path, tmp_path / "new", width=64, force=False, progress=lambda *_: None
        )


def test_the_sharpest_frames_of_a_video_are_taken(tmp_path: Path):
    """Every fourth frame is sharp."""
    texture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8))
    blurred = texture.filter(ImageFilter.GaussianBlur(3))
    frames = [np.asarray(blurred if number % 4 else texture) for number in range(24)]
    iio.imwrite(tmp_path / "clip.mp4", np.stack(frames), plugin="FFMPEG", fps=8)
    (tmp_path / "frames").mkdir()
    reports: list[tuple[str, int, int]] = []
    write_sharp_frames(
        tmp_path / "clip.mp4", tmp_path / "frames", 6, lambda *report: reports.append(report)
    )
    assert reports == [("parts of the video read", part, 6) for part in range(1, 7)]
    taken = sorted((tmp_path / "frames").iterdir())
    assert [file.name for file in taken] == [f"frame{part:03d}.png" for part in range(6)]
    assert all(np.asarray(Image.open(file)).std() > 40 for file in taken)
    with pytest.raises(ValueError, match="clip.mp4: has only 24 frames; give --frames 24"):
        write_sharp_frames(tmp_path / "clip.mp4", tmp_path / "frames", 99, lambda *_: None)


def measure_offset(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest distance of two camera centres as a share of the extent, with means and scales
    alike."""
    places = [recenter(poses)[..., 3].double() for poses in (found, truth)]
    near, exact = (place / place.norm() for place in places)
    return float((near - exact).norm(dim=1).max() / torch.cdist(exact, exact).max())


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of the page, run on a built-in scene as a phone would have taken it, with one
    photograph as HEIC."""
    pytest.importorskip("pillow_heif").register_heif_opener()
    folder = tmp_path_factory.mktemp("imported")
    (folder / "photos").mkdir()
    capture = draw("mosaic", width=256, num_views=8)
    focal = 36 * float(capture.intrinsics[0, 0]) / 256
    for view, image in enumerate(capture.images.numpy()):
        file = folder / "photos" / f"IMG_{view:04d}.{'HEIC' if view == 5 else 'JPG'}"
        save_as_of_a_phone(Image.fromarray(image), file, [1, 3, 6, 8][view % 4], focal)
    page = (ROOT / "docs" / "photographs.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- test -->\n```bash\n(.*?)```", page, re.DOTALL)
    assert block
    subprocess.run(["bash", "-euo", "pipefail", "-c", block[1]], cwd=folder, check=True)
    return folder


@pytest.mark.slow
@needs_pycolmap
def test_a_built_in_scene_is_found_from_its_photographs_alone(imported: Path):
    truth = draw("mosaic", width=256, num_views=8)
    found = read_capture(imported / "scenes" / "mine", 256)
    assert found.images.shape == truth.images.shape
    assert measure_offset(found.camera_to_world, truth.camera_to_world) < 0.01
    torch.testing.assert_close(found.intrinsics, truth.intrinsics, rtol=0.03, atol=0)
    # The lens is found, so pictures differ by JPEG and a slight zoom only.
    difference = (found.images.float() - truth.images.float()).abs()
    assert difference.mean() < 12
    assert "8 of 8 photographs of photos" in (imported / "scenes/mine/cameras.txt").read_text(
        encoding="utf-8"
    )
    for video in ("stage1.mp4", "refined.mp4"):
        assert (imported / "mine" / "video" / video).stat().st_size > 0


@pytest.mark.slow
@needs_pycolmap
@pytest.mark.skipif(not LLFF.exists(), reason="the shared scenes are absent")
def test_cameras_with_little_parallax_are_found_from_a_third_of_flower(tmp_path: Path):
    """COLMAP's own first focal length and parallax find no pair of photographs to start from."""
    (tmp_path / "photos").mkdir()
    for file in sorted((LLFF / "flower" / "images_4").iterdir())[::3]:
        (tmp_path / "photos" / file.name).symlink_to(file)
    note = import_photographs(
        tmp_path / "photos", tmp_path / "new", width=504, force=False, progress=lambda *_: None
    )
    assert note.startswith("12 of 12 photographs")
    found, official = read_capture(tmp_path / "new", 504), read_capture(LLFF / "flower", 504)
    assert measure_offset(found.camera_to_world, official.camera_to_world[::3]) < 0.015


@pytest.mark.slow
@needs_pycolmap
def test_photographs_of_another_place_are_left_out_by_force(tmp_path: Path, capsys):
    (tmp_path / "photos").mkdir()
    for name, views in (("mosaic", 8), ("pebbles", 6)):
        for view, image in enumerate(draw(name, width=256, num_views=8).images.numpy()[:views]):
            Image.fromarray(image).save(tmp_path / "photos" / f"{name}{view}.jpg", quality=95)
    command = ["import", str(tmp_path / "photos"), f"--output={tmp_path}/new"]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    assert "only 8 of 14 photographs have enough matches" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    main([*command, "--force"])
    note = capsys.readouterr().out
    others = ", ".join(f"pebbles{view}.jpg" for view in range(6))
    assert "8 of 14 photographs of photos" in note and f"far to the side: {others}\n" in note
    found, truth = read_capture(tmp_path / "new", 256), draw("mosaic", width=256, num_views=8)
    assert measure_offset(found.camera_to_world, truth.camera_to_world) < 0.02


@pytest.mark.slow
@needs_pycolmap
def test_cameras_are_found_from_the_frames_of_a_video(tmp_path: Path):
    """Each view lasts three frames, of which the middle one is sharp."""
    truth, frames = draw("mosaic", width=256, num_views=8), []
    for image in truth.images.numpy():
        blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(2)))
        frames += [blurred, image, blurred]
    iio.imwrite(tmp_path / "clip.mp4", np.stack(frames), plugin="FFMPEG", fps=10, quality=10)
    new = tmp_path / "new"
    main(["import", f"{tmp_path}/clip.mp4", "--from-video", "--frames=8", f"--output={new}"])
    found = read_capture(new, 256)
    assert measure_offset(found.camera_to_world, truth.camera_to_world) < 0.03

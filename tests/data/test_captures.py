"""Readers of all formats: the same scene, written in each, is the same capture."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from formats import WRITERS, write_colmap_text, write_images, write_transforms
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cbnerf.config import DataConfig
from cbnerf.data.captures import (
    find_photographs,
    find_scenes,
    fingerprint,
    is_scene_folder,
    read_capture,
)
from cbnerf.data.llff import write_capture
from cbnerf.data.scene import Capture, make_scene, recenter

CAPTURES = Path(os.environ.get("CBNERF_SHARED", "../shared")).resolve() / "captures"
OF_EACH_VIEW = torch.linspace(0.8, 1.25, 24, dtype=torch.float64).view(6, 4).flip(0)


@pytest.fixture(scope="module")
def capture(tiny_capture: Capture) -> Capture:
    """Six views."""
    return Capture("scene", *(part[:6] for part in tiny_capture[1:]))


@pytest.fixture(params=["middle", "one lens", "a lens for each view"])
def any_capture(request: pytest.FixtureRequest, capture: Capture) -> Capture:
    """With its principal point in the middle; anywhere, and fx != fy; others for each view."""
    factors = {
        "middle": torch.ones(4),
        "one lens": OF_EACH_VIEW[0],
        "a lens for each view": OF_EACH_VIEW,
    }
    return capture._replace(intrinsics=capture.intrinsics * factors[request.param])


def check_equal(found: Capture, expected: Capture) -> None:
    assert found.name == expected.name
    assert torch.equal(found.images, expected.images)
    torch.testing.assert_close(found.intrinsics, expected.intrinsics)
    torch.testing.assert_close(found.camera_to_world, expected.camera_to_world)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_scene_is_the_same_capture_in_every_format(
    kind: str, any_capture: Capture, tmp_path: Path
):
    if kind == "NeX" and len(any_capture.intrinsics.unique(dim=0)) > 1:
        pytest.skip("NeX has one lens")
    WRITERS[kind](tmp_path / "scene", any_capture)
    found = read_capture(tmp_path / "scene", 64)
    check_equal(found, any_capture)
    if kind == "NeX":
        assert torch.equal(found.bounds, any_capture.bounds)
    elif kind != "transforms":  # by percentiles, which drop the outliers, with a margin before
        expected = any_capture.bounds * torch.tensor([0.75, 1.0])
        torch.testing.assert_close(found.bounds, expected, rtol=0.05, atol=0)


def test_views_of_llff_may_differ_in_their_lens_and_size(capture: Capture, tmp_path: Path):
    zoomed = capture.intrinsics * torch.tensor([1.3, 1.3, 1.0, 1.0])
    mixed = capture._replace(intrinsics=torch.cat([capture.intrinsics[:3], zoomed[3:]]))
    write_capture(tmp_path / "scene", mixed)
    check_equal(read_capture(tmp_path / "scene", 64), mixed)
    # The last photograph is from a camera with twice as many pixels per side.
    rows = np.load(tmp_path / "scene" / "poses_bounds.npy")
    rows[5, [4, 9, 14]] *= 2
    np.save(tmp_path / "scene" / "poses_bounds.npy", rows)
    file = tmp_path / "scene" / "images" / "image005.png"
    with Image.open(file) as image:
        image.resize((128, 96), Image.Resampling.NEAREST).save(file)
    found = read_capture(tmp_path / "scene", 32)
    torch.testing.assert_close(found.intrinsics, mixed.intrinsics / 2)
    assert found.images.shape == (6, 24, 32, 3)
    assert find_photographs(tmp_path / "scene", 64).width == 64


@pytest.mark.parametrize("kind", WRITERS)
def test_smaller_copies_are_read_by_name(kind: str, capture: Capture, tmp_path: Path):
    WRITERS[kind](tmp_path / "scene", capture)
    (tmp_path / "scene" / "images_2").mkdir()
    for file in (tmp_path / "scene" / "images").iterdir():
        Image.new("RGB", (32, 24), (9, 9, 9)).save(
            tmp_path / "scene" / "images_2" / f"{file.stem}.bmp"
        )
    small = read_capture(tmp_path / "scene", 32)
    assert (small.images == 9).all()
    torch.testing.assert_close(small.intrinsics, capture.intrinsics / 2)
    assert torch.equal(read_capture(tmp_path / "scene", 64).images, capture.images)


def test_a_resized_photograph_is_stretched_with_its_lens(capture: Capture, tmp_path: Path):
    """63 x 47.25 pixels are 63 x 47, and the focal lengths differ by as much."""
    write_capture(tmp_path / "scene", capture)
    found = read_capture(tmp_path / "scene", 63)
    assert found.images.shape[1:3] == (47, 63)
    factors = torch.tensor([63 / 64, 47 / 48, 63 / 64, 47 / 48], dtype=torch.float64)
    torch.testing.assert_close(found.intrinsics, capture.intrinsics * factors)


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Change the content of `transforms.json`."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / "transforms.json").read_text(encoding="utf-8"))
        change(content)
        (folder / "transforms.json").write_text(json.dumps(content), encoding="utf-8")

    return apply


@edit
def drop_suffixes(content: dict) -> None:
    for frame in content["frames"]:
        frame["file_path"] = frame["file_path"].removesuffix(".png")


@edit
def give_angles(content: dict) -> None:
    width, height = content.pop("w"), content.pop("h")
    content["camera_angle_x"] = 2 * np.arctan(width / 2 / content.pop("fl_x"))
    content["camera_angle_y"] = 2 * np.arctan(height / 2 / content.pop("fl_y"))


@edit
def give_one_angle(content: dict) -> None:
    """And the middle as principal point, as of Blender."""
    content["camera_angle_x"] = 2 * np.arctan(content["w"] / 2 / content["fl_x"])
    for key in ("w", "h", "fl_x", "fl_y", "cx", "cy"):
        del content[key]


@edit
def move_world(content: dict) -> None:
    """To z up, as nerfstudio does, but mirrored: undone, space is what it was."""
    applied = np.array([[1.0, 0, 0, 2], [0, 0, 1, -1], [0, 1, 0, 0.5]])
    content["applied_transform"] = applied.tolist()
    for frame in content["frames"]:
        moved = applied @ np.array(frame["transform_matrix"])
        frame["transform_matrix"] = moved.tolist()


def move_photographs(folder: Path) -> None:
    (folder / "images").rename(folder / "photos")
    edit(lambda content: [
        frame.update(file_path=frame["file_path"].replace("images/", "photos/"))
        for frame in content["frames"]
    ])(folder)  # fmt: skip


@pytest.mark.parametrize(
    "change", [drop_suffixes, give_angles, give_one_angle, move_world, move_photographs]
)
def test_spellings_of_transforms(change: Callable, capture: Capture, tmp_path: Path):
    write_transforms(tmp_path / "scene", capture)
    change(tmp_path / "scene")
    check_equal(read_capture(tmp_path / "scene", 64), capture)


def test_ignored_masks_are_reported(capture: Capture, tmp_path: Path):
    write_transforms(tmp_path / "scene", capture)
    edit(lambda content: content["frames"][2].update(mask_path="masks/2.png"))(tmp_path / "scene")
    found = str(find_photographs(tmp_path / "scene", 64))
    assert found == "scene/images (64x48); the masks in transforms.json are ignored"


def test_guessed_bounds_keep_what_the_cameras_see(capture: Capture, tmp_path: Path):
    write_transforms(tmp_path / "scene", capture)
    found, near = read_capture(tmp_path / "scene", 64).bounds[:, 0], capture.bounds[:, 0]
    assert (found < near).all() and (found > near / 4).all()


@pytest.mark.parametrize("kind", WRITERS)
def test_photographs_without_a_camera_are_left_out(kind: str, capture: Capture, tmp_path: Path):
    """But LLFF and NeX know no names."""
    WRITERS[kind](tmp_path / "scene", capture)
    shutil.copy(tmp_path / "scene/images/image001.png", tmp_path / "scene/images/another.png")
    if kind == "NeX":
        with pytest.raises(ValueError, match="has 7 images but"):
            read_capture(tmp_path / "scene", 64)
    else:
        check_equal(read_capture(tmp_path / "scene", 64), capture)


def test_a_folder_is_a_scene_by_its_cameras(capture: Capture, tmp_path: Path):
    for kind, write in WRITERS.items():
        write(tmp_path / kind, capture)
    write_images(tmp_path / "none", capture)
    assert find_scenes(tmp_path) == sorted(WRITERS)
    assert is_scene_folder(tmp_path / "none")
    with pytest.raises(ValueError, match="none/poses_bounds.npy: no such file; a scene has"):
        read_capture(tmp_path / "none", 64)
    hashes = {fingerprint(tmp_path / kind, 64) for kind in WRITERS}
    assert len(hashes) == len(WRITERS)


def replace_in(file: str, old: str, new: str) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        text = (folder / file).read_text(encoding="utf-8")
        assert old in text
        (folder / file).write_text(text.replace(old, new, 1), encoding="utf-8")

    return apply


def set_value(key: str, value: object, frame: int | None = None) -> Callable[[Path], object]:
    return edit(
        lambda content: (content if frame is None else content["frames"][frame]).update(
            {key: value}
        )
    )


MALFORMED_TRANSFORMS: dict[str, tuple[Callable, str]] = {
    "no JSON": (
        lambda f: (f / "transforms.json").write_bytes(b"{"),
        "json: not JSON",
    ),
    "deep": (
        lambda f: (f / "transforms.json").write_bytes(b"[" * 10**5),
        "json: not JSON",
    ),
    "a list": (
        lambda f: (f / "transforms.json").write_bytes(b"[]"),
        "json: holds no frames",
    ),
    "no frames": (set_value("frames", []), "json: holds no frames"),
    "no path": (set_value("file_path", None, 3), "a frame without file_path"),
    "no matrix": (set_value("transform_matrix", None, 3), "image002.png: expected a matrix"),
    "a short matrix": (set_value("transform_matrix", [[1, 0], [0, 1]], 3), "expected a matrix"),
    "a ragged matrix": (set_value("transform_matrix", [[1, 0], [0]], 3), "expected a matrix"),
    "words": (set_value("fl_x", "wide"), "fl_x = 'wide' is no number"),
    "no focal": (set_value("fl_x", 0), "neither fl_x nor camera_angle_x"),
    "negative focal": (set_value("fl_y", -5), "height, width and focal must be positive"),
    "infinite": (set_value("cx", 1e400), "holds values that are not finite"),
    "a fisheye": (set_value("camera_model", "OPENCV_FISHEYE"), "OPENCV_FISHEYE.*undistort"),
    "fisheye": (set_value("is_fisheye", True), "has a distortion that is not read"),
    "folded": (set_value("k1", -3.0), "folds the image over"),
    "other size": (set_value("w", 72), "has another aspect than its camera"),
    "no photograph": (
        set_value("file_path", "images/7.png", 3),
        "images/7.png: no such photo",
    ),
    "twice": (set_value("file_path", "images/image001.png", 3), "image001.png has two cameras"),
    "mirrored": (
        set_value("transform_matrix", [[-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], 3),
        "the pose of images/image002.png mirrors space",
    ),
}
SPARSE = "sparse/0"
MALFORMED_MODELS: dict[str, tuple[Callable, str]] = {
    "no cameras": (lambda f: (f / SPARSE / "cameras.txt").unlink(), "cameras.txt: no such file"),
    "no points": (lambda f: (f / SPARSE / "points3D.txt").unlink(), "points3D.txt: no such file"),
    "no images": (lambda f: (f / SPARSE / "images.txt").write_bytes(b""), "holds no images"),
    "a folder": (lambda f: shutil.rmtree(f / SPARSE), "images.txt: no such file"),
    "another lens": (replace_in(f"{SPARSE}/cameras.txt", "OPENCV", "FOV"), "model FOV is not read"),
    "too few numbers": (replace_in(f"{SPARSE}/cameras.txt", " 0.0", ""), "broken COLMAP model"),
    "a word": (replace_in(f"{SPARSE}/images.txt", " 12 ", " x "), "broken COLMAP model"),
    "unknown camera": (
        replace_in(f"{SPARSE}/images.txt", " 12 ", " 99 "),
        "the camera of image005.png is not in cameras.txt",
    ),
    "no photograph": (lambda f: (f / "images/image003.png").unlink(), "image003.png: no such"),
}  # fmt: skip


CASES = [*MALFORMED_TRANSFORMS, *(f"{case} of COLMAP" for case in MALFORMED_MODELS)]


@pytest.mark.parametrize("case", CASES)
def test_malformed_cameras_are_refused_in_one_line(case: str, capture: Capture, tmp_path: Path):
    of_colmap = case.endswith(" of COLMAP")
    write = write_colmap_text if of_colmap else write_transforms
    write(tmp_path / "scene", capture)
    cases = MALFORMED_MODELS if of_colmap else MALFORMED_TRANSFORMS
    damage, message = cases[case.removesuffix(" of COLMAP")]
    damage(tmp_path / "scene")
    with pytest.raises(ValueError, match=message) as error:
        read_capture(tmp_path / "scene", 64)
    assert str(error.value).startswith(str(tmp_path / "scene")) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def written(capture: Capture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("written")
    for kind, write in WRITERS.items():
        write(root / kind, capture)
    return root


@given(data=st.data())
@settings(derandomize=True, database=None, deadline=None, max_examples=200)
def test_any_damage_to_cameras_names_the_file(data: st.DataObject, written: Path):
    """Any bytes cut, changed or added: a capture, or one line that names the file."""
    kind = data.draw(st.sampled_from(sorted(WRITERS)))
    with tempfile.TemporaryDirectory() as root:
        folder = Path(shutil.copytree(written / kind, Path(root) / "scene"))
        files = (file for file in folder.rglob("*") if file.is_file() and file.suffix != ".png")
        file = data.draw(st.sampled_from(sorted(files)))
        content, noise = file.read_bytes(), data.draw(st.binary(max_size=9))
        place = int(data.draw(st.floats(0, 1)) * len(content))
        way = data.draw(st.sampled_from(["cut", "change", "insert"]))
        after = {"cut": len(content), "change": place + len(noise), "insert": place}[way]
        file.write_bytes(content[:place] + noise + content[after:])
        try:
            assert read_capture(folder, 64).images.shape == (6, 48, 64, 3)
        except ValueError as error:
            assert str(error).startswith(str(folder)) and "\n" not in str(error)


@pytest.mark.skipif(not CAPTURES.exists(), reason="the shared captures are absent")
def test_a_capture_with_two_kinds_of_cameras_is_one_scene(tmp_path: Path):
    """ollie: NeX files beside a model of COLMAP 4, in another frame and unit."""
    nex = read_capture(CAPTURES / "ollie", 64)
    for entry in ("images", "sparse"):
        (tmp_path / entry).symlink_to(CAPTURES / "ollie" / entry)
    colmap = read_capture(tmp_path, 64)
    assert torch.equal(nex.images, colmap.images)
    torch.testing.assert_close(nex.intrinsics, colmap.intrinsics, rtol=1e-3, atol=0)
    places = [recenter(found.camera_to_world) for found in (nex, colmap)]
    near, other = (poses[..., 3] / poses[..., 3].norm() for poses in places)
    torch.testing.assert_close(near, other, atol=2e-3, rtol=0)
    # One stray point made the near bound of NeX a third of that of the percentiles.
    scenes = [make_scene(found, DataConfig(width=64)) for found in (nex, colmap)]
    apart = [scene.camera_to_world[..., 3].norm() for scene in scenes]
    assert 2 < apart[0] / apart[1] < 4


@pytest.mark.skipif(not CAPTURES.exists(), reason="the shared captures are absent")
def test_a_capture_from_half_around_is_refused():
    with pytest.raises(ValueError, match="fox/transforms.json: .* must be forward-facing"):
        find_photographs(CAPTURES / "fox", 64)

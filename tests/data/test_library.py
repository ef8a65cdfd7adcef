import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cbnerf.config import DataConfig
from cbnerf.data.library import (
    DATA_VARIABLE,
    DEFAULT_DATA,
    PAPER_SCENES,
    STORAGE_VARIABLE,
    check_scenes,
    choose_scenes,
    default_storage,
    describe_photographs,
    load_scene,
    locate_data,
    scene_folder,
)
from cbnerf.data.llff import write_capture
from cbnerf.data.scene import Capture
from cbnerf.scenes import BUILT_IN_SCENES

KNOBS = DataConfig(width=64)


@pytest.fixture(autouse=True)
def nothing_at_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.delenv(STORAGE_VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def add_scenes(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "poses_bounds.npy").touch()
    return root


def test_all_means_every_scene_those_of_the_paper_first():
    found = choose_scenes("all", ["garden", "mine", "trex", "fern"], Path("data"))
    assert found == ("fern", "trex", "garden", "mine")
    assert choose_scenes("all", sorted(PAPER_SCENES), Path("data")) == PAPER_SCENES


def test_all_of_other_data_means_every_scene():
    assert choose_scenes("all", ["a", "b"], Path("data")) == ("a", "b")
    assert choose_scenes("all", list(BUILT_IN_SCENES), None) == BUILT_IN_SCENES
    assert len(BUILT_IN_SCENES) == 8


def test_a_scene_cannot_be_called_all():
    with pytest.raises(ValueError, match=r"^data: a scene cannot be called `all`, .*rename it$"):
        choose_scenes("all", ["all", "fern"], Path("data"))


@pytest.mark.parametrize(
    "wanted, expected",
    [
        ("street, north", ("street, north",)),
        ('fern,"street, north"', ("fern", "street, north")),
        ('"street, north" , fern', ("street, north", "fern")),
        ('"say ""x"""', ('say "x"',)),
    ],
)
def test_a_name_with_a_comma_is_quoted(wanted: str, expected: tuple[str, ...]):
    available = ["fern", "street, north", 'say "x"']
    assert choose_scenes(wanted, available, Path("data")) == expected
    with pytest.raises(ValueError, match='there are fern, "street, north", "say ""x"""'):
        choose_scenes("street,fern", available, Path("data"))


def test_an_archive_may_have_unpacked_into_a_folder_of_its_own_name():
    inner = add_scenes(DEFAULT_DATA / DEFAULT_DATA.name, "fern", "trex", ".unfinished")
    assert locate_data(None) == (inner.resolve(), ["fern", "trex"])
    assert locate_data(DEFAULT_DATA) == locate_data(None)


def test_several_folders_of_scenes_are_named():
    add_scenes(Path("all/ours"), "garden")
    add_scenes(Path("all/theirs"), "fern")
    with pytest.raises(ValueError, match="all: no scenes, but ours, theirs in it hold some"):
        locate_data(Path("all"))


def test_a_scene_in_place_of_a_folder_of_scenes_is_refused(tmp_path: Path):
    add_scenes(tmp_path / "photos", "fern")
    with pytest.raises(ValueError, match=f"--data {tmp_path}/photos --scenes fern"):
        locate_data(Path("photos/fern"))


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    home = add_scenes(tmp_path / "home" / "photos", "fern").resolve()
    assert locate_data(Path("~/photos")) == (home, ["fern"])
    monkeypatch.setenv(DATA_VARIABLE, "~/photos")
    assert locate_data(None) == (home, ["fern"])
    monkeypatch.setenv(STORAGE_VARIABLE, "~/runs")
    assert default_storage() == tmp_path / "home" / "runs"
    monkeypatch.setenv(STORAGE_VARIABLE, "~nobody-of-this-name/runs")
    with pytest.raises(ValueError, match="no such home folder"):
        default_storage()


def test_a_folder_with_the_name_of_a_built_in_scene_is_ambiguous(tmp_path: Path):
    assert choose_scenes("mosaic", list(BUILT_IN_SCENES), None) == ("mosaic",)
    Path("mosaic/field").mkdir(parents=True)  # what a training left is no scene
    assert choose_scenes("mosaic", list(BUILT_IN_SCENES), None) == ("mosaic",)
    Path("mosaic/images").mkdir()
    with pytest.raises(ValueError, match="mosaic is a folder of photographs .*--data [.] for"):
        choose_scenes("mosaic", list(BUILT_IN_SCENES), None)
    add_scenes(tmp_path, "fern")
    assert choose_scenes("fern", *reversed(locate_data(Path(".")))) == ("fern",)


def test_scenes_are_checked_without_their_pixels(tiny_capture: Capture, tmp_path: Path):
    write_capture(tmp_path / "fern", tiny_capture)
    few = tiny_capture._replace(
        images=tiny_capture.images[:4],
        camera_to_world=tiny_capture.camera_to_world[:4],
        intrinsics=tiny_capture.intrinsics[:4],
        bounds=tiny_capture.bounds[:4],
    )
    write_capture(tmp_path / "few", few)
    spell = "--knobs {}={}".format
    assert check_scenes(["fern"], tmp_path, KNOBS, spell) == {"fern": 10}
    assert check_scenes(["mosaic"], None, KNOBS, spell) == {"mosaic": 13}
    with pytest.raises(ValueError, match=f"^{tmp_path}/few: of 4 .* set --knobs data.test_every=7"):
        check_scenes(["fern", "few"], tmp_path, KNOBS, spell)
    with pytest.raises(ValueError, match="^mosaic: of 13 photographs .* set --knobs"):
        check_scenes(["mosaic"], None, DataConfig(width=64, test_every=30), spell)


def test_the_photographs_that_are_read_are_reported(tiny_capture: Capture, tmp_path: Path):
    for name in ("fern", "trex"):
        write_capture(tmp_path / name, tiny_capture)
    told = describe_photographs(["fern", "trex"], tmp_path, 64)
    assert told == "fern/images (64x48), trex/images (64x48)"
    assert "built-in" in describe_photographs(["mosaic"], None, 64)


def test_named_scenes_keep_their_order_and_count_once():
    assert choose_scenes(" b, a,b,", ["a", "b", "c"], None) == ("b", "a")


@pytest.mark.parametrize("wanted", ["a,nowhere", "", ","])
def test_an_unknown_scene_is_named_with_those_that_exist(wanted: str):
    with pytest.raises(ValueError, match="there are a, b") as caught:
        choose_scenes(wanted, ["a", "b"], Path("photos"))
    assert "photos" in str(caught.value)
    assert ("nowhere" in str(caught.value)) == ("nowhere" in wanted)


def test_a_built_in_scene_is_drawn_once_and_then_read(tmp_path: Path):
    first = load_scene("mosaic", None, tmp_path, KNOBS)
    poses = scene_folder("mosaic", None, tmp_path, 64) / "poses_bounds.npy"
    written = poses.stat().st_mtime_ns
    load_scene.cache_clear()
    again = load_scene("mosaic", None, tmp_path, KNOBS)
    assert poses.stat().st_mtime_ns == written
    assert first.images.shape == (13, 48, 64, 3) and torch.equal(first.images, again.images)


def test_a_scene_of_a_folder_is_read_from_there(tiny_capture: Capture, tmp_path: Path):
    write_capture(tmp_path / "photos" / "fern", tiny_capture)
    scene = load_scene("fern", tmp_path / "photos", tmp_path / "runs", KNOBS)
    assert scene.name == "fern" and torch.equal(scene.images, tiny_capture.images)
    assert not (tmp_path / "runs").exists()


def test_of_many_processes_one_draws_a_built_in_scene(tmp_path: Path):
    scene = (
        "import sys, pathlib; from cbnerf.config import DataConfig; "
        "from cbnerf.data.library import load_scene; folder = pathlib.Path(sys.argv[1]); "
        "print(load_scene('mosaic', None, folder, DataConfig(width=64)).num_views)"
    )
    command = [sys.executable, "-c", scene, str(tmp_path)]
    half = tmp_path / "scenes" / "64" / "mosaic" / "images"  # of a process that was killed once
    half.mkdir(parents=True)
    (half / "image000.png").write_bytes(b"half a picture")
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [reader.communicate()[0] for reader in readers] == ["13\n"] * 3
    assert [path.name for path in half.parent.parent.iterdir() if path.is_dir()] == ["mosaic"]

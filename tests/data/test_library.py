import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cbnerf.config import DataConfig
from cbnerf.data.library import PAPER_SCENES, choose_scenes, read_scene, scene_folder
from cbnerf.data.llff import write_capture
from cbnerf.data.scene import Capture
from cbnerf.scenes import BUILT_IN_SCENES

KNOBS = DataConfig(width=64)


def test_all_means_the_scenes_of_the_paper_that_are_there():
    assert choose_scenes("all", ["trex", "mine", "fern"], Path("data")) == ("fern", "trex")
    assert choose_scenes("all", sorted(PAPER_SCENES), Path("data")) == PAPER_SCENES


def test_all_of_other_data_means_every_scene():
    assert choose_scenes("all", ["a", "b"], Path("data")) == ("a", "b")
    assert choose_scenes("all", list(BUILT_IN_SCENES), None) == BUILT_IN_SCENES
    assert len(BUILT_IN_SCENES) == 8


def test_named_scenes_keep_their_order_and_count_once():
    assert choose_scenes(" b, a,b,", ["a", "b", "c"], None) == ("b", "a")


@pytest.mark.parametrize("wanted", ["a,nowhere", "", ","])
def test_an_unknown_scene_is_named_with_those_that_exist(wanted: str):
    with pytest.raises(ValueError, match="there are a, b") as caught:
        choose_scenes(wanted, ["a", "b"], Path("photos"))
    assert "photos" in str(caught.value)
    assert ("nowhere" in str(caught.value)) == ("nowhere" in wanted)


def test_a_built_in_scene_is_drawn_once_and_then_read(tmp_path: Path):
    first = read_scene("mosaic", None, tmp_path, KNOBS)
    poses = scene_folder("mosaic", None, tmp_path, 64) / "poses_bounds.npy"
    written = poses.stat().st_mtime_ns
    read_scene.cache_clear()
    again = read_scene("mosaic", None, tmp_path, KNOBS)
    assert poses.stat().st_mtime_ns == written
    assert first.images.shape == (13, 48, 64, 3) and torch.equal(first.images, again.images)


def test_a_scene_of_a_folder_is_read_from_there(tiny_capture: Capture, tmp_path: Path):
    write_capture(tmp_path / "photos" / "fern", tiny_capture)
    scene = read_scene("fern", tmp_path / "photos", tmp_path / "runs", KNOBS)
    assert scene.name == "fern" and torch.equal(scene.images, tiny_capture.images)
    assert not (tmp_path / "runs").exists()


def test_of_many_processes_one_draws_a_built_in_scene(tmp_path: Path):
    scene = (
        "import sys, pathlib; from cbnerf.config import DataConfig; "
        "from cbnerf.data.library import read_scene; folder = pathlib.Path(sys.argv[1]); "
        "print(read_scene('mosaic', None, folder, DataConfig(width=64)).num_views)"
    )
    command = [sys.executable, "-c", scene, str(tmp_path)]
    half = tmp_path / "scenes" / "64" / "mosaic" / "images"  # of a process that was killed once
    half.mkdir(parents=True)
    (half / "image000.png").write_bytes(b"half a picture")
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [reader.communicate()[0] for reader in readers] == ["13\n"] * 3
    assert [path.name for path in half.parent.parent.iterdir() if path.is_dir()] == ["mosaic"]

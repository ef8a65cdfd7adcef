import json
import os
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from cbnerf.cli import main
from cbnerf.data.captures import read_capture
from cbnerf.data.llff import write_capture
from cbnerf.data.scene import Capture, make_scene
from cbnerf.overrides import load_config, with_overrides
from cbnerf.presets import preset

SHORT = [
    "--resolution=tiny", "--field.optim.steps=3", "--field.num-coarse-samples=8",
    "--field.num-fine-samples=4", "--refiner.optim.steps=3", "--codebook.size=16",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny_capture: Capture, tmp_path_factory) -> Path:
    """A folder with a scene of 64x47 pixels, a field and a refiner; names as the flags'."""
    folder = tmp_path_factory.mktemp("runs")
    middle = tiny_capture.intrinsics - torch.tensor([0, 0, 0, 0.5])
    cropped = tiny_capture._replace(images=tiny_capture.images[:, :47], intrinsics=middle)
    write_capture(folder / "scene", cropped)
    main(["train-field", f"--scene={folder}/scene", f"--output={folder}/field", *SHORT])
    main(["train-refiner", f"--scene={folder}/scene", f"--field={folder}/field",
          f"--output={folder}/refiner", *SHORT])  # fmt: skip
    return folder


def test_training_leaves_its_files_and_knobs(runs: Path):
    files = {
        "field": {"field.pt", "renders.npz", "strip.png"},
        "refiner": {"refiner.pt", "strip.png"},
    }
    expected = with_overrides(
        preset("cb-nerf", "tiny"),
        {"field.optim.steps": 3, "field.num_coarse_samples": 8, "field.num_fine_samples": 4,
         "refiner.optim.steps": 3, "codebook.size": 16},
    )  # fmt: skip
    for stage, own in files.items():
        found = {file.name for file in (runs / stage).iterdir()}
        assert found == own | {"config.yaml", "metrics.json", "manifest.json"}
        assert load_config(runs / stage / "config.yaml") == expected


def test_a_finished_command_can_be_given_again(runs: Path, capsys):
    main(["train-field", f"--scene={runs}/scene", f"--output={runs}/field", *SHORT])
    out = capsys.readouterr().out
    assert "val/psnr" in out and "step " not in out


def test_the_photographs_that_are_read_are_named(
    runs: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    train = ["train-field", *SHORT]
    main([*train, f"--scene={runs}/scene", f"--output={runs}/field"])
    assert capsys.readouterr().out.startswith("photographs  scene/images (64x47)\n")
    monkeypatch.chdir(tmp_path)
    main([*train, "--scene=mosaic", "--output=mosaic/field"])
    assert capsys.readouterr().out.startswith("photographs  built-in scene mosaic\n")
    main([*train, "--scene=mosaic", "--output=mosaic/field"])  # that folder is no scene
    assert capsys.readouterr().out.startswith("photographs  built-in scene mosaic\n")


def test_a_folder_comes_before_the_built_in_scene_of_its_name(
    runs: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    write_capture(tmp_path / "mosaic", read_capture(runs / "scene", 64))
    monkeypatch.chdir(tmp_path)
    for place, name in ((tmp_path, "mosaic"), (tmp_path / "mosaic", ".")):
        monkeypatch.chdir(place)
        main(["train-field", f"--scene={name}", f"--output={tmp_path}/{name}/field", *SHORT])
        out = capsys.readouterr().out
        assert "photographs  mosaic/images (64x47)" in out
        assert ("the folder, not the built-in scene" in out) == (name == "mosaic")
    (tmp_path / "mosaic" / "poses_bounds.npy").unlink()  # a broken folder is not passed over
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["train-field", "--scene=mosaic", f"--output={tmp_path}/new", *SHORT])
    assert "mosaic/poses_bounds.npy: no such file" in capsys.readouterr().err


def test_a_tilde_in_a_flag_is_the_home_folder(
    runs: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(runs))
    monkeypatch.chdir(tmp_path)
    main(["train-refiner", "--scene=~/scene", "--field=~/field", "--output=~/refiner", *SHORT])
    main(["evaluate", "--scene=~/scene", "--field=~/field", "--refiner=~/refiner"])
    assert "refined" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_evaluation_names_every_test_view_and_the_mean(runs: Path, capsys):
    main(["evaluate", f"--scene={runs}/scene", f"--field={runs}/field",
          f"--refiner={runs}/refiner"])  # fmt: skip
    title, *rows = capsys.readouterr().out.splitlines()
    assert title == "scene, protocol holdout, 64x46"
    labels = [row.split("PSNR")[0].split() for row in rows]
    assert labels == [
        [*name.split(), *place]
        for name in ("stage 1", "refined")
        for place in (["view", "0"], ["view", "8"], ["mean"])
    ]
    for group in (rows[:3], rows[3:]):
        views_and_mean = [float(row.split("PSNR")[1].split()[0]) for row in group]
        assert np.mean(views_and_mean[:2]) == pytest.approx(views_and_mean[2], abs=0.011)


def test_evaluation_writes_the_views_that_it_scores(runs: Path, tmp_path: Path, capsys):
    evaluate = ["evaluate", f"--scene={runs}/scene", f"--field={runs}/field",
                f"--output={tmp_path}/views"]  # fmt: skip
    main([*evaluate, f"--refiner={runs}/refiner"])
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"{tmp_path}/views: photographs, stage1, refined of 2 test views"
    )
    files = [file for file in (tmp_path / "views").rglob("*") if file.is_file()]
    views = {file.relative_to(tmp_path / "views").as_posix(): iio.imread(file) for file in files}
    names = ("photographs", "stage1", "refined")
    assert set(views) == {f"{name}/{view}.png" for name in names for view in ("000", "008")}
    scene = make_scene(read_capture(runs / "scene", 64), preset("cb-nerf", "tiny").data)
    with np.load(runs / "field" / "renders.npz") as renders:
        for view in (0, 8):
            assert np.array_equal(views[f"photographs/{view:03d}.png"], scene.images[view])
            assert np.array_equal(views[f"stage1/{view:03d}.png"], renders["rgb"][view])
    assert views["refined/008.png"].shape == views["stage1/008.png"].shape
    with pytest.raises(SystemExit):  # before anything is computed
        main([*evaluate, "--field=nowhere"])
    assert "views: is there already; give another --output" in capsys.readouterr().err
    assert {file for file in (tmp_path / "views").rglob("*") if file.is_file()} == set(files)


def test_inspection_pictures_the_codebook(runs: Path, tmp_path: Path, capsys):
    main(["inspect", f"--scene={runs}/scene", f"--field={runs}/field",
          f"--refiner={runs}/refiner", f"--output={tmp_path}/pictures"])  # fmt: skip
    out = capsys.readouterr().out
    assert "2 test views of scene  codebook/perplexity" in out
    assert iio.imread(tmp_path / "pictures" / "codes.png").shape == (4 * 16, 4 * 16, 3)
    # Photograph, codes, render, codes and agreement, cut to 44 rows.
    assert iio.imread(tmp_path / "pictures" / "map.png").shape == (44, 5 * 64 + 4 * 4, 3)
    assert iio.imread(tmp_path / "pictures" / "usage.png").ndim == 3


@pytest.mark.parametrize("with_refiner", [False, True])
def test_a_video_has_the_frames_asked_for(runs: Path, with_refiner: bool, tmp_path: Path):
    refiner = [f"--refiner={runs}/refiner"] if with_refiner else []
    main(["render", f"--field={runs}/field", f"--output={tmp_path}", "--frames=3", *refiner])
    names = ["stage1", "refined"] if with_refiner else ["stage1"]
    for name in names:
        video = iio.imread(tmp_path / f"{name}.mp4", plugin="FFMPEG")
        assert video.shape == (3, 46, 64, 3)
        for number, frame in enumerate(video):
            still = iio.imread(tmp_path / f"{name}-{number:03d}.png")
            assert still.shape == (46, 64, 3)
            assert np.abs(frame.astype(int) - still).mean() < 25  # it is compressed
    metrics = json.loads((tmp_path / "video.json").read_text(encoding="utf-8"))
    assert set(metrics) == {"seen"} | {f"{name}/warping_error" for name in names}
    assert len(list(tmp_path.iterdir())) == 4 * len(names) + 1


def test_a_refiner_that_wants_photographs_is_scored_but_renders_no_video(
    runs: Path, tmp_path: Path, capsys
):
    main(["train-refiner", f"--scene={runs}/scene", f"--field={runs}/field", "--preset=nerf-sr",
          f"--output={tmp_path}/refiner", *SHORT, "--refiner.references=2"])  # fmt: skip
    main(["evaluate", f"--scene={runs}/scene", f"--field={runs}/field",
          f"--refiner={tmp_path}/refiner"])  # fmt: skip
    assert capsys.readouterr().out.count("refined") == 3
    with pytest.raises(SystemExit):
        main(["render", f"--field={runs}/field", f"--refiner={tmp_path}/refiner",
              f"--output={tmp_path}/video"])  # fmt: skip
    assert "looks into a high-res photograph" in capsys.readouterr().err
    assert not (tmp_path / "video").exists()


def test_scenes_can_share_a_refiner(runs: Path, tmp_path: Path, capsys):
    twice = [f"--scene={runs}/scene", "mosaic", f"--field={runs}/field", f"{tmp_path}/field"]
    twice = [part for word in twice for part in word.split("=", 1)]
    main(["train-field", "--scene=mosaic", f"--output={tmp_path}/field", *SHORT])
    command = ["train-refiner", *twice, f"--output={tmp_path}/refiner", *SHORT]
    main([*command, "--codebook.shared"])
    for scene, field in ((f"{runs}/scene", runs), ("mosaic", tmp_path)):
        main(["evaluate", f"--scene={scene}", f"--field={field}/field",
              f"--refiner={tmp_path}/refiner"])  # fmt: skip
    assert "refined  mean" in capsys.readouterr().out
    for wrong, problem in (
        (command, "--codebook.shared only"),
        ([*command, "--codebook.shared", "--field", f"{tmp_path}/field"], "--field 1"),
    ):
        with pytest.raises(SystemExit):
            main(wrong)
        (line,) = capsys.readouterr().err.splitlines()
        assert problem in line


def test_a_field_of_all_views_has_none_left_to_score(tiny_capture: Capture, tmp_path: Path, capsys):
    write_capture(tmp_path / "scene", tiny_capture)
    main(["train-field", f"--scene={tmp_path}/scene", f"--output={tmp_path}/field", *SHORT,
          "--data.test-every=0", "--data.no-validation"])  # fmt: skip
    with pytest.raises(SystemExit):
        main(["evaluate", f"--scene={tmp_path}/scene", f"--field={tmp_path}/field"])
    assert "trained on all views" in capsys.readouterr().err


def test_videos_of_odd_sizes_are_cut_even(tiny_capture: Capture, tmp_path: Path):
    middle = tiny_capture.intrinsics - torch.tensor([0, 0, 0.5, 0.5])
    odd = tiny_capture._replace(images=tiny_capture.images[:, :47, :63], intrinsics=middle)
    write_capture(tmp_path / "scene", odd)
    odd_knobs = ["--data.width=63", "--data.scale=1", "--refiner.patch-size=32"]
    main(["train-field", f"--scene={tmp_path}/scene", f"--output={tmp_path}/field", *SHORT,
          *odd_knobs])  # fmt: skip
    main(["render", f"--field={tmp_path}/field", f"--output={tmp_path}/video", "--frames=2"])
    assert iio.imread(tmp_path / "video" / "stage1-000.png").shape == (47, 63, 3)
    assert iio.imread(tmp_path / "video" / "stage1.mp4", plugin="FFMPEG").shape == (2, 46, 62, 3)


def test_made_scenes_can_be_read(tmp_path: Path, capsys):
    main(["make-scenes", f"--output={tmp_path}", "--scenes=mosaic,blinds", "--width=32",
          "--views=4"])  # fmt: skip
    assert {folder.name for folder in tmp_path.iterdir()} == {"mosaic", "blinds"}
    assert read_capture(tmp_path / "mosaic", 32).images.shape == (4, 24, 32, 3)


def spoil(runs: Path, folder: Path) -> Path:
    """A copy of the scene with malformed cameras."""
    write_capture(folder / "scene", read_capture(runs / "scene", 64))
    (folder / "scene" / "poses_bounds.npy").write_bytes(b"no")
    return folder / "scene"


TRAIN = ["train-field", "--output={new}", *SHORT]
REFINE = ["train-refiner", "--scene={runs}/scene", "--output={new}", *SHORT]
MISTAKES = {
    "no such scene": ([*TRAIN, "--scene=nowhere"], "nowhere: no such folder"),
    "malformed cameras": ([*TRAIN, "--scene={spoilt}"], "poses_bounds.npy: not a NumPy"),
    "too few pixels": (
        [*TRAIN, "--scene={runs}/scene", "--data.width=128"],
        "asked for images 128 pixels wide, the largest are 64",
    ),
    "unknown preset": ([*TRAIN, "--scene=mosaic", "--preset=nerv"], "unknown method 'nerv'"),
    "unknown resolution": (
        [*TRAIN, "--scene=mosaic", "--resolution=x9"], "unknown resolution 'x9'"
    ),
    "knob out of range": (
        [*TRAIN, "--scene=mosaic", "--codebook.size", "1"], "codebook.size = 1 must be at least 2"
    ),
    "patch too large": (
        [*REFINE, "--field={runs}/field", "--refiner.patch-size=64"],
        "refiner.patch_size = 64 does not fit into 64x46 images",
    ),
    "other knobs": (
        ["train-field", "--scene={runs}/scene", "--output={runs}/field", *SHORT, "--seed=5"],
        "field: finished with other knobs",
    ),
    "finished for another scene": (
        ["train-field", "--scene={namesake}", "--output={runs}/field", *SHORT],
        "field: finished with the scene scene, not namesake; choose another folder",
    ),
    "finished for another stage": (
        ["train-refiner", "--scene={runs}/scene", "--field={runs}/field", "--output={runs}/field",
         *SHORT], "refiner.pt: no such checkpoint",
    ),
    "field of another scene": (
        ["evaluate", "--scene={namesake}", "--field={runs}/field"],
        "field: a field of the scene scene, not of namesake",
    ),
    "a negative age": (["cache", "prune", "--storage={runs}", "--days=-1"], "at least 0"),
    "field of another resolution": (
        [*REFINE, "--field={runs}/field", "--data.width=32"],
        "its field has 10 views of 64x46, the scene 10 views of 32x24",
    ),
    "no field": ([*REFINE, "--field={new}"], "field.pt: no such checkpoint"),
    "no checkpoint": (["evaluate", "--scene=mosaic", "--field={new}"], "no such checkpoint"),
    "a refiner as field": (
        ["render", "--field={swapped}", "--output={new}"], "holds a refiner, expected a field"
    ),
    "no frames": (
        ["render", "--field={runs}/field", "--output={new}", "--frames=0"], "must be at least 1"
    ),
    "unknown scene": (["make-scenes", "--output={new}", "--scenes=fern"], "'fern' is not built in"),
    "no pixels": (["make-scenes", "--output={new}", "--width=0"], "--width must be at least 16"),
    "no views": (["make-scenes", "--output={new}", "--views=1"], "--views at least 2"),
    "too few views": (
        [*TRAIN, "--scene={few}"],
        "few: of 4 photographs data.test_every = 8 leaves fewer than 2 to train on, or none to "
        "select on; give at least 5, or set --data.test_every 7",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_ends_in_one_line_and_nothing_half_done(
    case: str, runs: Path, tmp_path: Path, capsys
):
    arguments, message = MISTAKES[case]
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    (swapped / "field.pt").write_bytes((runs / "refiner" / "refiner.pt").read_bytes())
    (runs / "cache").mkdir(exist_ok=True)
    (tmp_path / "namesake").symlink_to(runs / "scene")
    folders = {"runs": runs, "new": tmp_path / "new", "swapped": swapped,
               "spoilt": spoil(runs, tmp_path), "namesake": tmp_path / "namesake",
               "few": tmp_path / "few"}  # fmt: skip
    capture = read_capture(runs / "scene", 64)
    write_capture(tmp_path / "few", Capture("few", *(part[:4] for part in capture[1:])))
    with pytest.raises(SystemExit) as stop:
        main([argument.format(**folders) for argument in arguments])
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("cbnerf: ") and message in line
    assert line.count("\n") == 1
    assert {file.name for file in folders["new"].glob("*")} <= {"config.yaml"}


def test_the_mend_for_few_views_is_a_flag_that_is_taken(tmp_path: Path, capsys):
    main(["make-scenes", f"--output={tmp_path}", "--scenes=mosaic", "--width=64", "--views=4"])
    train = ["train-field", f"--scene={tmp_path}/mosaic", f"--output={tmp_path}/field", *SHORT]
    with pytest.raises(SystemExit):
        main(train)
    mend = capsys.readouterr().err.split("or set ")[1].split()
    main([*train, *mend])
    assert "val/psnr" in capsys.readouterr().out


def test_unknown_flags_are_named(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train-field", "--scene=mosaic", "--output=new", "--codebook.sise=4"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "--codebook.sise" in error and "--codebook.size" in error


def test_help_shows_knobs_with_their_docstrings_and_preset(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train-refiner", "--preset=cb-nerf", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--codebook.size" in text and "Number of codes" in text
    assert "(default: 16)" in text  # codebook.dim of this preset


def torchrun(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Two processes of a command line."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [sys.executable, *command, "-m", "cbnerf", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def test_of_two_processes_one_prints(tmp_path: Path):
    knobs = ["--resolution", "tiny", "--field.optim.steps", "4", "--field.optim.evaluations", "2"]
    ran = torchrun("train-field", "--scene", "mosaic", "--output", str(tmp_path), *knobs)
    assert ran.returncode == 0, ran.stderr
    photographs, *steps, last = ran.stdout.splitlines()
    assert photographs == "photographs  built-in scene mosaic"
    assert [step.split("  ")[0] for step in steps] == ["step 2", "step 4"]
    assert all("val/psnr" in line for line in (*steps, last)) and last.startswith(f"{tmp_path}: {{")


def test_what_does_not_train_refuses_several_processes(tmp_path: Path):
    ran = torchrun("make-scenes", "--output", str(tmp_path / "scenes"), "--width", "64")
    assert ran.returncode != 0 and "cbnerf: torchrun is for train-field" in ran.stderr
    assert ran.stdout == "" and not (tmp_path / "scenes").exists()

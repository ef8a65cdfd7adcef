import json
from pathlib import Path

import pytest
import torch
from comparing import assert_same_state, read_files

from cbnerf.config import Config
from cbnerf.data.renders import Renders, load_renders
from cbnerf.data.scene import Scene
from cbnerf.nerf.model import AUTO_PRECISION
from cbnerf.overrides import load_config, with_overrides
from cbnerf.training.checkpoint import load_checkpoint
from cbnerf.training.evaluation import refine_views
from cbnerf.training.models import load_field, load_refiner
from cbnerf.training.stages import (
    read_metrics,
    read_strip,
    run_field,
    run_refiner,
    shown_view,
)

CPU = torch.device("cpu")


@pytest.fixture(params=["field", "refiner"])
def stage(request) -> str:
    return request.param


@pytest.fixture
def config(tiny_config: Config) -> Config:
    every_step = {"steps": 4, "evaluations": 4}
    knobs = {f"{s}.optim.{k}": v for s in ("field", "refiner") for k, v in every_step.items()}
    return with_overrides(tiny_config, knobs)


@pytest.fixture
def run(stage: str, config: Config, tiny_scene: Scene, tiny_renders: Renders, tmp_path: Path):
    """Runs a stage in a folder; gives its metrics and the steps it reported."""

    def run(folder: Path = tmp_path, config: Config = config, stop_at: int = 0, part: int = 1):
        steps = []

        def report(step, metrics, checkpoint) -> None:
            steps.append(step)
            if step == stop_at:
                raise InterruptedError

        if stage == "field":
            metrics = run_field(config, tiny_scene, folder, device=CPU, report=report, part=part)
        else:
            metrics = run_refiner(
                config, tiny_scene, tiny_renders, folder, device=CPU, report=report, part=part
            )
        return metrics, steps

    return run


def test_a_finished_folder_holds_its_files(stage: str, run, config: Config, tmp_path: Path):
    metrics, _ = run(tmp_path / "new")
    files = {"field": {"renders.npz", "strip.png"}, "refiner": {"strip.png"}}
    names = {file.name for file in (tmp_path / "new").iterdir()}
    always = {"config.yaml", "metrics.json", "manifest.json"}
    assert names == {f"{stage}.pt"} | files[stage] | always
    assert load_config(tmp_path / "new" / "config.yaml") == config
    assert json.loads((tmp_path / "new" / "metrics.json").read_text(encoding="utf-8")) == metrics
    assert {"train/loss", "val/psnr", "seconds"} < set(metrics)
    file = tmp_path / "new" / f"{stage}.pt"
    model = load_field(file, CPU)[0] if stage == "field" else load_refiner(file, CPU)
    assert metrics["parameters"] == sum(p.numel() for p in model.parameters()) > 0
    if stage == "field":
        assert load_renders(tmp_path / "new" / "renders.npz").rgb.shape == (10, 48, 64, 3)


def test_a_strip_holds_a_validation_view(
    stage: str, run, tiny_scene: Scene, tiny_renders: Renders, config: Config, tmp_path: Path
):
    file = tmp_path / "new" / "strip.png"
    assert read_strip(file, 2) is None
    run(file.parent)
    if stage == "field":
        images = read_strip(file, 2)
        expected = [tiny_scene.images[4], load_renders(file.parent / "renders.npz").rgb[4]]
    else:
        images = read_strip(file, 3)
        refiner = load_refiner(file.parent / "refiner.pt", CPU)
        refined = refine_views(refiner, tiny_renders.of([4]), CPU)[0]
        expected = [tiny_scene.images[4], tiny_renders.rgb[4], refined]
    assert images is not None and shown_view(config, 10) == 4
    assert [torch.equal(*pair) for pair in zip(images, expected, strict=True)] == [True] * len(
        images
    )


def test_a_finished_folder_is_not_trained_again(run, tmp_path: Path):
    metrics, steps = run()
    assert steps == [1, 2, 3, 4]
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert run() == (metrics, [])
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("stop_at, left", [(2, [3, 4]), (4, [])])
def test_an_unfinished_folder_goes_on_and_ends_alike(stage, run, stop_at, left, tmp_path: Path):
    with pytest.raises(InterruptedError):
        run(tmp_path / "stopped", stop_at=stop_at)
    assert read_metrics(tmp_path / "stopped") is None
    metrics, steps = run(tmp_path / "stopped")
    assert steps == left
    whole, _ = run(tmp_path / "whole")
    assert metrics | {"seconds": 0} == whole | {"seconds": 0}
    weights = [
        torch.load(tmp_path / folder / f"{stage}.pt", weights_only=True)["model"]
        for folder in ("stopped", "whole")
    ]
    assert_same_state(*weights)


def test_rungs_lead_to_the_same_end(stage: str, run, config: Config, tmp_path: Path):
    config = with_overrides(config, {f"{stage}.optim.evaluations": 1})
    climbed, seconds = [], []
    for part in (4, 2, 2, 1):
        metrics, steps = run(tmp_path / "climbed", config=config, part=part)
        climbed.append(steps)
        seconds.append(metrics["seconds"])
        assert (read_metrics(tmp_path / "climbed") is None) == (part > 1)
    assert climbed == [[1], [2], [], [4]]
    assert seconds[1] == seconds[2]
    assert seconds == sorted(seconds) and seconds[0] < seconds[-1]
    whole, steps = run(tmp_path / "whole", config=config)
    assert steps == [4]
    assert whole["val/psnr"] == metrics["val/psnr"]


@pytest.mark.parametrize("stop_at", [0, 2])
def test_other_knobs_are_refused_and_change_nothing(stage, run, config, stop_at, tmp_path: Path):
    if stop_at:
        with pytest.raises(InterruptedError):
            run(stop_at=stop_at)
    else:
        run()
    before = read_files(tmp_path)
    other = with_overrides(config, {f"{stage}.optim.lr": 0.5})
    with pytest.raises(ValueError, match="with other knobs"):
        run(config=other)
    assert read_files(tmp_path) == before


@pytest.mark.parametrize("stage", ["field"], indirect=True)
def test_a_finished_field_serves_any_stage_two(run, config: Config):
    metrics, _ = run()
    assert run(config=with_overrides(config, {"codebook.size": 7})) == (metrics, [])


@pytest.mark.parametrize("stage", ["field"], indirect=True)
def test_a_field_goes_on_in_the_precision_that_it_was_begun_in(
    run, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(AUTO_PRECISION, "bfloat16")
    with pytest.raises(InterruptedError):
        run(stop_at=2)
    begun = load_checkpoint(tmp_path / "field.pt", "field", CPU)
    assert (begun.precision, begun.config.field.precision) == ("bfloat16", "auto")
    before = read_files(tmp_path)
    monkeypatch.setenv(AUTO_PRECISION, "float32")
    with pytest.raises(ValueError, match="begun in bfloat16 .* give --field.precision bfloat16"):
        run()
    with pytest.raises(ValueError, match="with other knobs"):
        run(config=with_overrides(config, {"field.precision": "float32"}))
    assert read_files(tmp_path) == before
    named = with_overrides(config, {"field.precision": "bfloat16"})
    metrics, steps = run(config=named)
    assert steps == [3, 4]
    # What is finished is finished, on whatever machine.
    assert run() == (metrics, []) and run(config=named) == (metrics, [])
    with pytest.raises(ValueError, match="finished with other knobs"):
        run(config=with_overrides(config, {"field.precision": "float32"}))


@pytest.mark.parametrize("stage", ["refiner"], indirect=True)
def test_a_refiner_computes_in_float32(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(AUTO_PRECISION, "bfloat16")
    run()
    assert load_checkpoint(tmp_path / "refiner.pt", "refiner", CPU).precision == "float32"

"""`python tune.py` in its own process: one study is finished and extended, one is interrupted."""

import json
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import mlflow
import numpy as np
import pytest
import torch
from drivers import ROOT, SMOKE, Drivers, Ended, call_tune, plan_of
from mlflow import MlflowClient

from cbnerf.commands.storage import Report
from cbnerf.config import flatten
from cbnerf.overrides import load_config
from cbnerf.search.mlflow_store import runs_page
from cbnerf.search.state import StudyState
from cbnerf.search.steering import enqueue
from cbnerf.strict_yaml import load_yaml
from cbnerf.training.checkpoint import load_checkpoint
from cbnerf.training.stages import read_strip, shown_view

pytestmark = [
    pytest.mark.search,
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),  # MLflow's
]

COMMAND = ["--config", str(SMOKE), "--scenes", "arcade,blinds"]
CPU = ROOT / "tune_configs" / "cpu.yaml"
CPU_DEVICE = torch.device("cpu")
RACE = ["--config", str(CPU), "--scenes", "arcade,blinds", "--resolution", "tiny"]
NAME = "cb-nerf-tiny-arcade-blinds"
QUEUED = {"codebook.size": 64, "loss.lambda_imitation": 0.3}
UNITS = ("0/arcade/0", "0/blinds/0", "1/arcade/0", "1/blinds/0")


@dataclass
class Story:
    """A study that is finished, repeated and extended."""

    folder: Path
    finished: Ended
    repeated: Ended
    extended: Ended

    @property
    def study(self) -> Path:
        return self.folder / "runs" / "studies" / NAME


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("story")
    drivers = Drivers(folder, NAME)
    try:
        finished = drivers.run(*COMMAND, precision="bfloat16")
        # Meanwhile it has moved to another kind of machine.
        repeated = drivers.run(*COMMAND, precision="float32")
        enqueue(folder / "runs", NAME, [f"{knob}={value}" for knob, value in QUEUED.items()])
        more = ["--resume", "--name", NAME, "--trials", "3", "--confirm", "1"]
        yield Story(folder, finished, repeated, drivers.run(*more, precision="float32"))
    finally:
        drivers.end_all()


def test_a_study_runs_each_unit_once(story: Story):
    assert story.finished.status == 0, story.finished.errors
    assert story.finished.recorded == dict.fromkeys(UNITS, 1)
    assert len(story.finished.trained) == 4


def test_the_output_ends_with_results_paths_and_links(story: Story):
    lines = story.finished.output.splitlines()
    assert lines[0] == f"study      {NAME}"
    assert any("not comparable with the paper" in line for line in lines[1:3])
    table = [line for line in lines if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["arcade", "blinds", "mean"]
    assert any(line.startswith("time       ") and "stage 1" in line for line in lines)
    assert f"report     {story.study / 'report.html'}" in lines
    best = [line for line in lines if line.startswith("best       configuration ")]
    assert len(best) == 1 and best[0].endswith(str(story.study / "best.yaml"))
    store, experiment = experiment_of(story.folder)
    assert lines[-2] == f"compare    mlflow ui --backend-store-uri {store}"
    page = f"http://127.0.0.1:5000/{runs_page(experiment, 'val/psnr')}"
    assert lines[-1] == f"           and open {page}"


@pytest.mark.parametrize(
    "noise", ["[I 20", "INFO", "Warning", "WARNING", "Traceback", "pid=", "artifacts:"]
)
def test_libraries_are_silent(story: Story, noise: str):
    for ended in (story.finished, story.repeated, story.extended):
        assert noise not in ended.output + ended.errors


def test_the_best_configuration_can_be_loaded_and_lies_in_the_space(story: Story):
    best = load_config(story.study / "best.yaml")
    assert best.data.width == 64
    assert best.codebook.size in (64, 1024) and 0.1 <= best.loss.lambda_imitation <= 10


def test_a_finished_study_trains_nothing_again(story: Story):
    again = story.repeated
    assert again.status == 0, again.errors
    assert "nothing is trained again" in again.output
    assert (again.trained, again.recorded) == (story.finished.trained, story.finished.recorded)

    def table(ended: Ended) -> list[str]:
        return [line for line in ended.output.splitlines() if line.startswith("|")]

    assert table(again) == table(story.finished)


def test_a_report_can_be_written_again(story: Story, capfd: pytest.CaptureFixture[str]):
    page = story.study / "report.html"
    before = page.read_text(encoding="utf-8")
    page.unlink()
    Report(study=NAME, storage=story.folder / "runs").run()
    assert capfd.readouterr().out.strip() == str(page)
    assert page.read_text(encoding="utf-8") == before


def test_more_trials_extend_a_finished_study(story: Story):
    ended = story.extended
    assert ended.status == 0, ended.errors
    assert story.repeated.trained.items() <= ended.trained.items()
    new = ended.recorded - story.repeated.recorded
    assert new == {"2/arcade/0": 1, "2/blinds/0": 1}


def test_a_configuration_that_was_queued_is_trained(story: Story):
    state = StudyState(plan_of(story.folder / "runs", NAME), adopt=False)
    trial = state.study.get_trials()[2]
    assert trial.params == QUEUED and trial.values is not None
    scenes = ("arcade", "blinds")
    for config in (load_config(story.study / "trials/0002" / s / "config.yaml") for s in scenes):
        assert flatten(config).items() >= QUEUED.items()


def test_other_seeds_confirm_the_leaders_on_the_same_fields(story: Story):
    files = sorted(story.study.glob("confirmation/*/*/*/config.yaml"))
    places = [file.relative_to(story.study / "confirmation").parts[:3] for file in files]
    numbers, scenes = ("0000", "0001", "0002"), ("arcade", "blinds")
    assert places == [(number, "seed-1", scene) for number in numbers for scene in scenes]
    assert {load_config(file).seed for file in files} == {1}
    state = StudyState(plan_of(story.folder / "runs", NAME), adopt=False)
    best, means = state.best(), state.confirmed()
    assert best is not None and best.number == max(means, key=lambda n: sum(means[n].values()))
    assert f"best       configuration {best.number}, " in story.extended.output
    assert "over other seeds (1)" in story.extended.output
    assert "Leaders trained again" in (story.study / "report.md").read_text(encoding="utf-8")


def experiment_of(folder: Path) -> tuple[str, str]:
    """The store in a folder, and the study's experiment in it."""
    store = f"sqlite:///{folder / 'runs' / 'mlflow.db'}"
    experiment = MlflowClient(store).get_experiment_by_name(NAME)
    assert experiment is not None
    return store, experiment.experiment_id


def test_mlflow_holds_each_run_of_the_study_once(story: Story):
    store, experiment = experiment_of(story.folder)
    client = MlflowClient(store)
    runs = client.search_runs([experiment])
    kinds = Counter(run.data.tags["cbnerf.kind"] for run in runs)
    assert kinds == {"configuration": 3, "scene": 6, "field": 2, "report": 1}
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        if run.data.tags["cbnerf.kind"] == "scene":
            curve = client.get_metric_history(run.info.run_id, "val/psnr")
            steps = [point.step for point in curve]
            assert steps == sorted(set(steps)) and steps[-1] == 10
    assert all("val/psnr" in run.data.metrics for run in runs)


def test_the_best_configuration_is_a_model_that_renders_and_refines(
    story: Story, monkeypatch: pytest.MonkeyPatch
):
    store, _ = experiment_of(story.folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    (address,) = re.findall(r"^model +(.*)$", story.extended.output, re.MULTILINE)
    assert address == f"models:/{NAME}@champion"
    model = mlflow.pyfunc.load_model(address)
    state = StudyState(plan_of(story.folder / "runs", NAME), adopt=False)
    best = state.best()
    assert best is not None
    for scene in ("arcade", "blinds"):
        strip = read_strip(state.plan.trial_folder(best.number, scene) / "strip.png", 3)
        assert strip is not None
        view = shown_view(state.plan.base, 13)
        (png,) = model.predict([{"scene": scene, "view": view}])
        assert np.array_equal(iio.imread(png), strip[2].numpy())
    for scene, view in (("nowhere", 0), ("arcade", 13)):
        with pytest.raises(Exception, match=f"no (scene '{scene}'|view {view})"):
            model.predict([{"scene": scene, "view": view}])
    versions = MlflowClient(store).search_model_versions(f"name = '{NAME}'")
    chosen = {version.tags["cbnerf.configuration"] for version in versions}
    assert str(best.number) in chosen and len(versions) == len(chosen)


def test_a_study_keeps_to_the_precision_that_it_was_started_in(story: Story):
    for ended in (story.finished, story.repeated, story.extended):
        assert "precision  bfloat16 in stage 1" in ended.output.splitlines()
    assert load_yaml(story.study / "request.yaml")["precision"] == "bfloat16"
    assert load_config(story.study / "best.yaml").field.precision == "bfloat16"
    for name in ("report.md", "report.html"):
        assert "precision of stage 1: bfloat16" in (story.study / name).read_text(encoding="utf-8")
    entries = list((story.folder / "runs" / "cache").glob("field-*"))
    for entry in entries:
        assert (
            json.loads((entry / "manifest.json").read_text(encoding="utf-8"))["precision"]
            == "bfloat16"
        )
        assert load_checkpoint(entry / "field.pt", "field", CPU_DEVICE).precision == "bfloat16"
    assert len(entries) == 2
    store, experiment = experiment_of(story.folder)
    noted = [
        (run.data.tags["cbnerf.kind"], run.data.params["precision"])
        for run in MlflowClient(store).search_runs([experiment])
        if run.data.tags["cbnerf.kind"] in ("configuration", "field")
    ]
    assert Counter(noted) == {("configuration", "bfloat16"): 3, ("field", "bfloat16"): 2}


def test_stage_1_is_trained_once(story: Story):
    cache = sorted((story.folder / "runs" / "cache").glob("field-*"))
    assert [entry.name.split("-")[1] for entry in cache] == ["arcade", "blinds"]
    first_unit = min(story.finished.trained.values())
    assert all((entry / "metrics.json").stat().st_mtime_ns < first_unit for entry in cache)


@pytest.mark.slow
def test_a_race_survives_kill_and_ctrl_c_and_repeats_no_unit(tmp_path: Path):
    drivers = Drivers(tmp_path, NAME)
    # Enough units that some are left when a signal arrives.
    arguments = [*RACE, "--name", NAME, "--trials", "6"]

    def more_are_recorded() -> Callable[[], bool]:
        before = len(drivers.recorded())
        return lambda: len(drivers.recorded()) > before

    def one_is_queued() -> bool:
        """Once the study runs, another process queues a configuration."""
        if more_than_none():
            enqueue(tmp_path / "runs", NAME, ["refiner.optim.lr=1.23e-3"])
            return True
        return False

    more_than_none = more_are_recorded()
    try:
        killed = drivers.run(*arguments, until=one_is_queued, by=signal.SIGKILL)
        interrupted = drivers.run(*arguments, until=more_are_recorded(), by=signal.SIGINT)
        finished = drivers.run(*arguments)
    finally:
        drivers.end_all()
    assert killed.status == -signal.SIGKILL
    assert interrupted.status == 130
    last = interrupted.errors.strip().splitlines()[-1]
    assert last == "tune.py: interrupted; run the same command again to resume"
    assert "Traceback" not in interrupted.errors
    assert not interrupted.lingering
    assert finished.status == 0, finished.errors
    assert 0 < len(killed.recorded) < len(interrupted.recorded) < len(finished.recorded)
    assert killed.recorded <= interrupted.recorded <= finished.recorded
    assert set(finished.recorded.values()) == {1}
    for before in (killed, interrupted):
        assert before.trained.items() <= finished.trained.items()
    trials = StudyState(plan_of(tmp_path / "runs", NAME), adopt=False).study.get_trials()
    assert len(trials) == 6 and all(trial.values is not None for trial in trials)
    assert [trial.params["refiner.optim.lr"] for trial in trials].count(1.23e-3) == 1
    store, experiment = experiment_of(tmp_path)
    runs = MlflowClient(store).search_runs([experiment])
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
    keys = Counter(run.data.tags["cbnerf.key"] for run in runs)
    assert set(keys.values()) == {1}


def test_another_search_under_the_same_name_is_refused(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "other.yaml").write_text(
        SMOKE.read_text(encoding="utf-8") + "seed: 7\n", encoding="utf-8"
    )
    before = (story.study / "request.yaml").read_text(encoding="utf-8")
    there = ["--storage", str(story.folder / "runs"), "--name", NAME]
    lines = [
        ["--config", "other.yaml", "--scenes", "arcade,blinds"],
        ["--config", str(SMOKE), "--scenes", "arcade"],
    ]
    assert call_tune(monkeypatch, "--resume", "--resolution", "x2-128", *there) == 2
    assert "leave out --resolution" in capfd.readouterr().err
    for arguments, changed in zip(lines, ("seed", "scenes"), strict=True):
        assert call_tune(monkeypatch, *arguments, *there) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert f"was started with other {changed} (" in line and "--resume" in line
    assert (story.study / "request.yaml").read_text(encoding="utf-8") == before


def test_a_dry_run_prices_the_study_and_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    assert call_tune(monkeypatch, *COMMAND, "--dry-run") == 0
    output, errors = capfd.readouterr()
    assert errors == ""
    assert f"study      {NAME}" in output and "2 configurations x 2 scenes over" in output
    assert "s for a field" in output and "min on this machine, " in output
    assert not (tmp_path / "runs" / "studies").exists()
    assert not (tmp_path / "runs" / "mlflow.db").exists()

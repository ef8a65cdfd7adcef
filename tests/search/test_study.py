"""`python tune.py` as a user meets it: one study is finished and extended, one is disturbed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import mlflow
import numpy as np
import pytest
import torch
import yaml
from drawings import draw
from drivers import PATIENCE, plan_of, search_without_ray
from mlflow import MlflowClient

from cbnerf.commands.storage import Report
from cbnerf.config import flatten
from cbnerf.data.llff import write_capture
from cbnerf.nerf.model import AUTO_PRECISION
from cbnerf.overrides import load_config
from cbnerf.search import command
from cbnerf.search.mlflow_store import runs_page
from cbnerf.search.request import Options, read_request, settle
from cbnerf.search.state import StudyState
from cbnerf.search.steering import enqueue
from cbnerf.strict_yaml import load_yaml
from cbnerf.training.checkpoint import load_checkpoint
from cbnerf.training.stages import read_strip, shown_view

pytestmark = [
    pytest.mark.search,
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),  # MLflow's
]

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "tune_configs" / "smoke.yaml"
COMMAND = ["--config", str(SMOKE), "--scenes", "arcade,blinds"]
CPU = ROOT / "tune_configs" / "cpu.yaml"
CPU_DEVICE = torch.device("cpu")
RACE = ["--config", str(CPU), "--scenes", "arcade,blinds", "--resolution", "tiny"]
OTHERS = sorted({*(ROOT / "tune_configs").glob("*.yaml")} - {SMOKE, CPU})
NAME = "cb-nerf-tiny-arcade-blinds"
QUEUED = {"codebook.size": 64, "loss.lambda_imitation": 0.3}
UNITS = ("0/arcade/0", "0/blinds/0", "1/arcade/0", "1/blinds/0")


@dataclass
class Ended:
    """What one process left behind."""

    status: int
    output: str
    errors: str
    bookings: Counter[str]
    """How often each unit stands in the journal."""
    trained: dict[str, int]
    """When each unit was finished, by its folder."""
    lingering: list[int] = field(default_factory=list)
    """Processes that outlived the driver for ten seconds."""


class Drivers:
    """Starts `tune.py` in a folder, and knows all processes that came of it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.study = folder / "runs" / "studies" / NAME
        self._mark = f"CBNERF_TEST={uuid.uuid4().hex}"

    def run(
        self,
        *arguments: str,
        until: Callable[[], bool] | None = None,
        by: int = 0,
        precision: str | None = None,
    ) -> Ended:
        """Run to its end, or send the signal `by` to its process group once `until` is true; on a
        machine whose own precision is the one given."""
        own = {} if precision is None else {AUTO_PRECISION: precision}
        name, value = self._mark.split("=")
        driver = subprocess.Popen(
            [sys.executable, ROOT / "tune.py", *arguments],
            cwd=self.folder, env={**os.environ, **own, name: value}, start_new_session=True,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            # A shell's background jobs ignore Ctrl-C, and so would what they start.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        if until is not None:
            while driver.poll() is None and not until():
                time.sleep(0.05)
            os.killpg(driver.pid, by)
        output, errors = driver.communicate(timeout=PATIENCE)
        ended = Ended(driver.returncode, output, errors, self.bookings(), self.trained())
        if by == signal.SIGINT:
            deadline = time.monotonic() + 60
            while self.processes() and time.monotonic() < deadline:
                time.sleep(0.2)
            ended.lingering = self.processes()
        return ended

    def bookings(self) -> Counter[str]:
        try:
            lines = (self.study / "optuna.journal").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return Counter()
        booked = [json.loads(line).get("user_attr", {}) for line in lines if '"user_attr"' in line]
        return Counter(key for entry in booked for key in entry if "/" in key)

    def trained(self) -> dict[str, int]:
        files = (self.study / "trials").glob("*/*/metrics.json")
        return {str(file.parent): file.stat().st_mtime_ns for file in files}

    def processes(self) -> list[int]:
        found = []
        for entry in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self._mark.encode() in entry.read_bytes():
                    found.append(int(entry.parent.name))
            except OSError:
                continue
        return found

    def end_all(self) -> None:
        for process in self.processes():
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue


@dataclass
class Story:
    """The lives of a study that nobody disturbs."""

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
    drivers = Drivers(folder)
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
    assert story.finished.bookings == dict.fromkeys(UNITS, 1)
    assert len(story.finished.trained) == 4


def test_the_end_tells_all_that_a_user_wants_to_know(story: Story):
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
    assert (again.trained, again.bookings) == (story.finished.trained, story.finished.bookings)

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
    new = ended.bookings - story.repeated.bookings
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
    drivers = Drivers(tmp_path)
    # Enough units that some are left when a signal arrives.
    arguments = [*RACE, "--name", NAME, "--trials", "6"]

    def more_are_booked() -> Callable[[], bool]:
        before = len(drivers.bookings())
        return lambda: len(drivers.bookings()) > before

    def one_is_queued() -> bool:
        """Once the study runs, another process queues a configuration."""
        if more_than_none():
            enqueue(tmp_path / "runs", NAME, ["refiner.optim.lr=1.23e-3"])
            return True
        return False

    more_than_none = more_are_booked()
    try:
        killed = drivers.run(*arguments, until=one_is_queued, by=signal.SIGKILL)
        interrupted = drivers.run(*arguments, until=more_are_booked(), by=signal.SIGINT)
        finished = drivers.run(*arguments)
    finally:
        drivers.end_all()
    assert killed.status == -signal.SIGKILL
    assert interrupted.status == 130
    last = interrupted.errors.strip().splitlines()[-1]
    assert last == "tune.py: interrupted; the same command goes on where it stopped"
    assert "Traceback" not in interrupted.errors
    assert not interrupted.lingering
    assert finished.status == 0, finished.errors
    assert 0 < len(killed.bookings) < len(interrupted.bookings) < len(finished.bookings)
    assert killed.bookings <= interrupted.bookings <= finished.bookings
    assert set(finished.bookings.values()) == {1}
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


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage that several studies share, and with it their fields."""
    return tmp_path_factory.mktemp("shelf")


@pytest.mark.slow
@pytest.mark.parametrize("file", OTHERS, ids=lambda file: file.stem)
def test_every_search_of_tune_configs_comes_to_its_report(
    file: Path,
    shelf: Path,
    ray_address: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    small = ["--scenes", "arcade", "--resolution", "tiny", "--trials", "3"]
    where = ["--storage", str(shelf), "--name", file.stem, "--address", ray_address]
    arguments = ["--config", str(file), *small, *where]
    assert call(monkeypatch, *arguments) == 0, capfd.readouterr().err
    study = shelf / "studies" / file.stem
    assert {"best.yaml", "report.md", "report.html"} <= {entry.name for entry in study.iterdir()}
    trials = StudyState(plan_of(shelf, file.stem), adopt=False).study.get_trials()
    # A point of `initial` beyond the number of trials waits for a search with more.
    assert sum(trial.state.is_finished() for trial in trials) == 3


@pytest.mark.slow
def test_one_at_a_time_a_race_is_the_same_bit_for_bit_with_and_without_ray(
    tmp_path: Path,
    ray_address: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    arguments = [*RACE, "--name", NAME, "--trials", "3", "--concurrency", "1"]
    where = ["--storage", "with", "--address", ray_address]
    assert call(monkeypatch, *arguments, *where) == 0, capfd.readouterr().err
    plan = plan_of(tmp_path / "with", NAME)
    alone = search_without_ray(replace(plan, storage=tmp_path / "without"))
    assert trials_of(StudyState(plan, adopt=False)) == trials_of(alone)


def trials_of(state: StudyState) -> list[tuple[dict[str, Any], list[float] | None, dict[Any, Any]]]:
    """Knobs, objectives and values of the units of each configuration, but for their seconds."""
    trials = []
    for trial in state.study.get_trials():
        units = {
            place: metrics and {name: v for name, v in metrics.items() if name != "seconds"}
            for place, metrics in state.results(trial.number).items()
        }
        trials.append((trial.params, trial.values, units))
    return trials


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of a command line, run in this process."""
    monkeypatch.setattr(sys, "argv", ["tune.py", *arguments])
    try:
        command.main(ROOT / "tune_configs" / "default.yaml")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


BAD_LINES = {
    "scene": (["--scenes", "nowhere"], "no scene 'nowhere' in the built-in scenes"),
    "data": (["--data", "nowhere"], "nowhere: no scenes"),
    "no file": (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
    "broken file": (["--config", "broken.yaml"], "broken.yaml: not readable as YAML"),
    "method": (["--method", "nerf2"], "method 'nerf2' is not one of nerf, nerf-sr"),
    "resolution": (["--resolution", "x9"], "resolution 'x9' is not one of auto"),
    "trials": (["--trials", "0"], "trials must be at least 1"),
    "concurrency": (["--concurrency", "0"], "--concurrency must be at least 1"),
    "confirm": (["--confirm", "-1"], "--confirm must be at least 0"),
    "too many GPUs": (["--gpus", "1.5"], "(--gpus) = 1.5 must be 0, 1 or a part of 1"),
    "no stage 2": (["--method", "nerf"], "nerf ends with stage 1"),
    "name": (["--name", "a/b"], "'a/b' is not the name of a folder"),
    "resume": (["--resume"], "--resume: give the study's --name"),
    "resume unknown": (["--resume", "--name", "x"], "it holds none"),
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_bad_input_ends_in_one_line_and_leaves_nothing(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "broken.yaml").write_text("space: [", encoding="utf-8")
    arguments, problem = BAD_LINES[what]
    assert call(monkeypatch, *arguments) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    (line,) = errors.splitlines()
    assert line.startswith("tune.py: ") and problem in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["broken.yaml"]


def test_a_broken_scene_folder_is_named_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "photos" / "fern").mkdir(parents=True)
    (tmp_path / "photos" / "fern" / "poses_bounds.npy").write_bytes(b"nonsense")
    assert call(monkeypatch, "--data", "photos") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "fern/poses_bounds.npy" in line
    assert not (tmp_path / "runs").exists()


def test_too_few_photographs_are_refused_with_what_a_search_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    write_capture(tmp_path / "photos" / "mine", draw("mosaic", width=64, num_views=4))
    assert call(monkeypatch, "--config", str(SMOKE), "--data", "photos") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "mine: of 4 photographs" in line
    assert "or set `data.test_every: 7` under `fixed` of --config" in line
    spec = yaml.safe_load(SMOKE.read_text(encoding="utf-8"))
    spec["fixed"] = spec.get("fixed", {}) | {"data.test_every": 7}
    (tmp_path / "mended.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    options = Options(config=tmp_path / "mended.yaml", data=tmp_path / "photos",
                              storage=tmp_path / "runs")  # fmt: skip
    settled = settle(read_request(options, SMOKE), options, has_gpu=False)
    assert settled.views == {"mine": 4}
    assert not (tmp_path / "runs").exists()


def test_what_never_fits_on_this_machine_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    big = SMOKE.read_text(encoding="utf-8") + "\nresources: {cpus_per_worker: 1000}\n"
    (tmp_path / "big.yaml").write_text(big, encoding="utf-8")
    assert call(monkeypatch, "--config", "big.yaml", "--scenes", "arcade") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "needs 1000 CPUs" in line and "--address" in line
    assert not (tmp_path / "runs").exists()


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
    assert call(monkeypatch, "--resume", "--resolution", "x2-128", *there) == 2
    assert "leave out --resolution" in capfd.readouterr().err
    for arguments, changed in zip(lines, ("seed", "scenes"), strict=True):
        assert call(monkeypatch, *arguments, *there) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert f"was started with other {changed} (" in line and "--resume" in line
    assert (story.study / "request.yaml").read_text(encoding="utf-8") == before


def test_scenes_that_come_later_are_no_part_of_a_study(
    tmp_path: Path,
    ray_address: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    def add(scene: str) -> None:
        write_capture(tmp_path / "data" / scene, draw("mosaic", width=64, num_views=10))

    add("fern")
    add("room")
    line = ["--config", str(SMOKE), "--data", "data", "--name", "study"]
    options = Options(config=SMOKE, data=tmp_path / "data", name="study",
                              storage=tmp_path / "runs")  # fmt: skip
    settled = settle(read_request(options, SMOKE), options, has_gpu=False)
    settled.request.write(settled.plan.folder)
    add("flower")
    assert call(monkeypatch, *line) == 2
    assert "study study was started with other scenes (" in capfd.readouterr().err
    resume = ["--resume", "--name", "study", "--dry-run", "--address", ray_address]
    assert call(monkeypatch, *resume) == 0
    out = capfd.readouterr().out
    assert "scenes     fern (10), room (10)\n" in out
    assert "read from  fern/images (64x48), room/images (64x48)\n" in out


def test_a_dry_run_prices_the_study_and_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    assert call(monkeypatch, *COMMAND, "--dry-run") == 0
    output, errors = capfd.readouterr()
    assert errors == ""
    assert f"study      {NAME}" in output and "2 configurations x 2 scenes over" in output
    assert "s for a field" in output and "min on this machine, " in output
    assert not (tmp_path / "runs" / "studies").exists()
    assert not (tmp_path / "runs" / "mlflow.db").exists()

"""Studies that are resumed, reported and watched, also after their photographs have moved."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from drawings import draw
from drivers import ROOT, SMOKE, call_tune, content
from filelock import FileLock

from cbnerf.commands.storage import Report
from cbnerf.data.llff import write_capture
from cbnerf.search.plan import Plan
from cbnerf.search.request import Options, fingerprint_photographs, read_request, settle
from cbnerf.search.state import StudyState
from cbnerf.strict_yaml import load_yaml

pytestmark = pytest.mark.search

STRANGER = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]
"""Runs a command as a user without a name and without any right of root's."""
UNREADABLE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""A locale in which Python encodes files and output as ASCII."""


def photograph(folder: Path, *, num_views: int = 10) -> Path:
    """LLFF data of one scene."""
    write_capture(folder / "fern", draw("mosaic", width=64, num_views=num_views))
    return folder


def begin(data: Path, **options: Any) -> Plan:
    """A study that a driver has begun and that has got no further."""
    asked = Options(data=data, name="study", storage=Path("runs"), **options)
    settled = settle(read_request(asked, SMOKE), asked, has_gpu=False)
    known = fingerprint_photographs(settled)
    kept = replace(settled.request, photographs=known, resolution="tiny")
    kept.write(settled.plan.folder)
    return settled.plan


RESUME = ["--resume", "--name", "study"]


def test_moved_photographs_are_reported_and_found_with_data(
    tmp_path: Path,
    ray_address: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    plan = begin(photograph(tmp_path / "old"))
    (tmp_path / "old").rename(tmp_path / "new disk")
    assert call_tune(monkeypatch, *RESUME) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "old/fern: no such folder" in line and "--resume --name study --data FOLDER" in line
    moved = ["--data", "new disk"]
    for arguments in ([*RESUME, *moved], ["--config", str(SMOKE), "--name", "study", *moved]):
        priced = call_tune(monkeypatch, *arguments, "--dry-run", "--address", ray_address)
        assert priced == 0, capfd.readouterr().err
        assert "data       photographs in " in capfd.readouterr().out
    request = load_yaml(plan.folder / "request.yaml")
    asked = Options(resume=True, name="study", data=tmp_path / "new disk")
    again = settle(read_request(asked, SMOKE), asked, has_gpu=False)
    assert fingerprint_photographs(again) == request["photographs"]


@pytest.mark.parametrize("noted", [True, False])
def test_other_photographs_are_refused_before_ray_starts(
    noted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    plan = begin(photograph(tmp_path / "old"))
    file = plan.folder / "request.yaml"
    if not noted:  # by an older version
        kept = {name: v for name, v in load_yaml(file).items() if name != "photographs"}
        file.write_text(yaml.safe_dump(kept), encoding="utf-8")
    before = content(tmp_path / "runs")
    photograph(tmp_path / "new", num_views=11)
    assert call_tune(monkeypatch, *RESUME, "--data", "new") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "new/fern: not the photographs that study study was started with" in line
    assert str(tmp_path / "old") in line
    assert content(tmp_path / "runs") == before


def test_a_study_on_built_in_scenes_takes_no_photographs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    plan = begin(photograph(tmp_path / "data"))
    file = plan.folder / "request.yaml"
    built_in = load_yaml(file) | {"data": None, "scene_names": ["mosaic"], "photographs": {}}
    file.write_text(yaml.safe_dump(built_in), encoding="utf-8")
    assert call_tune(monkeypatch, *RESUME, "--data", "data") == 2
    assert "was started on built-in scenes" in capfd.readouterr().err


def test_a_report_of_what_has_not_got_far_writes_nothing(tmp_path: Path):
    with pytest.raises(ValueError, match="no study 'study' in runs/studies; it holds none"):
        Report(study="study", storage=Path("runs")).run()
    assert not list(tmp_path.iterdir())
    plan = begin(photograph(tmp_path / "data"))
    shutil.rmtree(tmp_path / "data")  # A report needs no photographs.
    driver = None
    for problem in ("it has not begun yet", "no configuration has finished yet"):
        before = content(tmp_path)
        with pytest.raises(ValueError, match=f"study study: {problem}"):
            Report(study="study", storage=Path("runs")).run()
        assert content(tmp_path) == before
        driver = driver or StudyState(plan)  # It has asked for nothing yet.
        assert driver.next_unit()
    before = content(tmp_path)
    with pytest.raises(ValueError, match="no study 'other' in runs/studies; there are study"):
        Report(study="other", storage=Path("runs")).run()
    assert content(tmp_path) == before


def report_of(plan: Plan) -> str:
    return (plan.folder / "report.html").read_text(encoding="utf-8")


def test_a_watched_study_is_reported_until_its_driver_ends(tmp_path: Path, monkeypatch, capfd):
    plan = begin(photograph(tmp_path / "data"))
    lock, pages = FileLock(plan.lock_file), []
    lock.acquire()
    state = StudyState(plan)

    def sleep(seconds: float) -> None:
        """What the driver does meanwhile: it trains a unit, and in the end it goes."""
        assert seconds == 7
        if pages or state.best():
            pages.append(report_of(plan))
        if unit := state.next_unit():
            state.record(unit, {"val/psnr": 20.0, "val/ssim": 0.5, "val/gain": 1.0})
        else:
            lock.release()

    monkeypatch.setattr("time.sleep", sleep)
    Report(study="study", storage=Path("runs"), watch=True, every=7).run()
    reloads = '<meta http-equiv="refresh" content="7">'
    assert len(pages) == 2 and all(reloads in page for page in pages)
    assert "1 configurations" in pages[0] and "2 configurations" in pages[1]
    assert reloads not in report_of(plan) and "2 configurations" in report_of(plan)
    waits, watches, last = capfd.readouterr().out.splitlines()
    assert waits == "study study: no configuration has finished yet; waiting"
    assert watches.startswith(f"{last} is written every 7 s; Ctrl-C") and Path(last).exists()


def test_ctrl_c_ends_the_watch_with_a_page_that_stays(tmp_path: Path, monkeypatch, capfd):
    plan = begin(photograph(tmp_path / "data"))

    def interrupt(seconds: float) -> None:
        assert "http-equiv" in report_of(plan)
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)
    with FileLock(plan.lock_file):
        state = StudyState(plan)
        for _ in range(len(plan.trainings)):
            unit = state.next_unit()
            assert unit is not None
            state.record(unit, {"val/psnr": 20.0, "val/ssim": 0.5, "val/gain": 1.0})
        Report(study="study", storage=Path("runs"), watch=True).run()
    assert "http-equiv" not in report_of(plan)
    with pytest.raises(ValueError, match="--every must be at least 1"):
        Report(study="study", storage=Path("runs"), watch=True, every=0).run()


def test_a_cluster_of_another_version_is_refused_in_one_line(ray_address: str):
    code = (
        "import sys; import ray; ray.__version__ = '2.1.0'; from pathlib import Path; "
        "from cbnerf.search import command; command.main(Path(sys.argv.pop()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--address", ray_address, str(SMOKE)],
        capture_output=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"tune.py: --address {ray_address}: ") and "2.1.0" in line


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> "tuple[Path, subprocess.CompletedProcess]":
    """A study in a container without a user, a home folder and a locale, its storage with a space
    in it, on photographs that move afterwards."""
    folder = tmp_path_factory.mktemp("foreign")
    if subprocess.run([*STRANGER, "true"], capture_output=True).returncode:
        pytest.skip("needs user namespaces")
    data = photograph(folder / "data")
    environment = {**os.environ, **UNREADABLE, "HOME": "/dev/null"}
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "USER", "LOGNAME"):
        environment.pop(name, None)
    done = subprocess.run(
        [*STRANGER, sys.executable, ROOT / "tune.py", "--config", SMOKE, "--name", "study",
         "--data", data, "--storage", "my runs"],
        cwd=folder, env=environment, capture_output=True, encoding="ascii",
    )  # fmt: skip
    data.rename(folder / "moved")
    return folder, done


@pytest.mark.slow
def test_a_study_needs_no_home_no_user_and_no_locale(foreign):
    folder, done = foreign
    assert done.returncode == 0, done.stderr
    page = (folder / "my runs" / "studies" / "study" / "report.html").read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>") and not page.isascii()


@pytest.mark.slow
def test_what_is_to_be_pasted_is_quoted(foreign):
    folder, done = foreign
    (server,) = re.findall(r"^compare +(.*)$", done.stdout, re.MULTILINE)
    *_, uri = shlex.split(server)
    assert uri.startswith("sqlite:///") and uri.endswith("/mlflow.db")
    assert len(shlex.split(server)) == 4
    for label, file in (("report", "report.html"), ("best", "best.yaml")):
        (line,) = re.findall(rf"^{label} +(.*)$", done.stdout, re.MULTILINE)
        path = Path(shlex.split(line)[-1])
        assert path.name == file and path.parent.parent.parent == folder / "my runs"


@pytest.mark.slow
def test_a_finished_study_is_reported_and_extended_where_its_photographs_have_moved(
    foreign, ray_address: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    folder, _ = foreign
    study = folder / "my runs" / "studies" / "study"
    pages = [(study / name).read_bytes() for name in ("report.html", "report.md", "best.yaml")]
    Report(study="study", storage=folder / "my runs").run()
    assert pages == [
        (study / name).read_bytes() for name in ("report.html", "report.md", "best.yaml")
    ]
    fields = sorted((folder / "my runs" / "cache").glob("field-*"))
    there = [
        "--storage",
        str(folder / "my runs"),
        *RESUME,
        "--trials",
        "3",
        "--address",
        ray_address,
    ]
    assert call_tune(monkeypatch, *there, "--data", str(folder / "moved")) == 0, (
        capfd.readouterr().err
    )
    assert load_yaml(study / "request.yaml")["data"] == str(folder / "moved")
    assert sorted((folder / "my runs" / "cache").glob("field-*")) == fields
    assert call_tune(monkeypatch, *there) == 0, capfd.readouterr().err


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
    assert call_tune(monkeypatch, *line) == 2
    assert "study study was started with other scenes (" in capfd.readouterr().err
    resume = ["--resume", "--name", "study", "--dry-run", "--address", ray_address]
    assert call_tune(monkeypatch, *resume) == 0
    out = capfd.readouterr().out
    assert "scenes     fern (10), room (10)\n" in out
    assert "read from  fern/images (64x48), room/images (64x48)\n" in out

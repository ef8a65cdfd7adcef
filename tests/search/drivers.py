"""`tune.py` in this process or in one of its own, the processes that it starts, what it leaves on
the disk, and a search without any of them."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from cbnerf.data.renders import load_renders
from cbnerf.nerf.model import AUTO_PRECISION
from cbnerf.overrides import with_overrides
from cbnerf.search import command
from cbnerf.search.plan import Plan, make_plan
from cbnerf.search.spec import parse_spec
from cbnerf.search.state import StudyState
from cbnerf.search.worker import run_base_field
from cbnerf.strict_yaml import load_yaml
from cbnerf.training.stages import RENDERS_FILE, run_refiner

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "tune_configs" / "smoke.yaml"
PATIENCE = 900
"""Seconds after which what has not come counts as hanging: far more than slow machines need."""


def call_tune(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of a command line of `tune.py`, run in this process; `smoke.yaml` is the
    default specification."""
    monkeypatch.setattr(sys, "argv", ["tune.py", *arguments])
    try:
        command.main(SMOKE)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@dataclass
class Ended:
    """What one process left behind."""

    status: int
    output: str
    errors: str
    recorded: Counter[str]
    """How often each unit is in the journal."""
    trained: dict[str, int]
    """When each unit was finished, by its folder."""
    lingering: list[int] = field(default_factory=list)
    """Processes that outlived the driver for ten seconds."""


class Drivers:
    """Starts `tune.py` in a folder, and finds all processes that it started."""

    def __init__(self, folder: Path, study: str):
        self.folder = folder
        self.study = folder / "runs" / "studies" / study
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
        ended = Ended(driver.returncode, output, errors, self.recorded(), self.trained())
        if by == signal.SIGINT:
            deadline = time.monotonic() + 60
            while self.processes() and time.monotonic() < deadline:
                time.sleep(0.2)
            ended.lingering = self.processes()
        return ended

    def recorded(self) -> Counter[str]:
        try:
            lines = (self.study / "optuna.journal").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return Counter()
        attributes = (
            json.loads(line).get("user_attr", {}) for line in lines if '"user_attr"' in line
        )
        return Counter(key for entry in attributes for key in entry if "/" in key)

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


def wait_for(condition: Callable[[], bool], work: "subprocess.Popen[str] | Future[None]") -> None:
    """Wait until a condition holds, which must come before the work has ended."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if isinstance(work, Future):
            assert not work.done(), work.result()
        else:
            assert work.poll() is None, work.communicate()
        assert time.monotonic() < deadline, "never came"
        time.sleep(0.01)


def finish(driver: "subprocess.Popen[str]", status: int = 0) -> str:
    """What it said on standard error; a hang ends the test."""
    try:
        output, errors = driver.communicate(timeout=PATIENCE)
    finally:
        driver.kill()
    assert driver.returncode == status, output + errors
    return errors


def rays_processes() -> dict[int, str]:
    """Title of each process of Ray that these tests have started, by its number; other tests may
    run beside them (pytest-xdist)."""
    name = "PYTEST_XDIST_WORKER"
    mark = f"{name}={os.environ[name]}\0".encode() if name in os.environ else b""
    titles: dict[int, str] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title = (process / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
            if title.startswith("ray::") and mark in (process / "environ").read_bytes():
                titles[int(process.name)] = title
        except OSError:
            continue
    return titles


def plan_of(storage: Path, name: str) -> Plan:
    """The plan of a study on built-in scenes that a `tune.py` has begun."""
    request = load_yaml(storage / "studies" / name / "request.yaml")
    spec = parse_spec(request["spec"] | {"resolution": request["resolution"]})
    return make_plan(
        spec, scenes=request["scenes"], data=None, name=name, storage=storage, has_gpu=False
    )


def search_without_ray(plan: Plan) -> StudyState:
    """The search of stage 2 with its units one after the other in this process."""
    fields = {scene: run_base_field(plan, scene)[0] for scene in plan.scenes}
    state = StudyState(plan)
    while (unit := state.next_unit()) is not None:
        config = with_overrides(plan.base, unit.overrides)
        metrics = run_refiner(
            config, plan.load_scene(unit.scene, config.data),
            load_renders(fields[unit.scene] / RENDERS_FILE),
            plan.trial_folder(unit.configuration, unit.scene),
            device=torch.device("cpu"), part=plan.part(unit.rung),
        )  # fmt: skip
        state.record(unit, metrics)
    return state


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Modification time and bytes of each file and folder."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in [folder, *folder.rglob("*")]
    }

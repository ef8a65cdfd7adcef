"""A `tune.py` in a process of its own, the processes of Ray that work for it, and a search without
either of them."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cbnerf.data.renders import load_renders
from cbnerf.overrides import with_overrides
from cbnerf.search.plan import Plan, make_plan
from cbnerf.search.spec import parse_spec
from cbnerf.search.state import StudyState
from cbnerf.search.worker import run_base_field
from cbnerf.strict_yaml import load_yaml
from cbnerf.training.stages import RENDERS_FILE, run_refiner

PATIENCE = 900
"""Seconds after which what has not come counts as hanging: far more than slow machines need."""


def wait_for(condition: Callable[[], bool], driver: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert driver.poll() is None, driver.communicate()
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

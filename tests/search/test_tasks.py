"""Work for each scene on a real Ray whose memory is nearly full from the start."""

import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from optuna.trial import TrialState
from ray import cloudpickle, tune
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError

from cbnerf.search import driver
from cbnerf.search.plan import Plan
from cbnerf.search.state import StudyState
from cbnerf.search.tasks import for_each_scene, reason

pytestmark = pytest.mark.search
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find this file
ROOM = 4e9
"""Bytes that all processes of the machine, also those of other tests, may take beyond what is taken
now."""


@pytest.fixture(scope="module", autouse=True)
def small_ray() -> Iterator[None]:
    memory = psutil.virtual_memory()
    limit = (memory.used + ROOM) / memory.total
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
        logging_level=logging.ERROR,
        _system_config={"memory_usage_threshold": limit, "memory_monitor_refresh_ms": 100},
    )  # fmt: skip
    yield
    ray.shutdown()


def take_memory() -> None:
    """Too much of it; where nobody minds, an error."""
    taken = []
    for _ in range(int(3 * ROOM / 1e8)):
        taken.append(np.ones(12_500_000))
        time.sleep(0.05)
    raise AssertionError("nobody minds")


def work(plan: Plan, log: Path, scene: str) -> str:
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{scene}\n")
    if scene == "arcade":
        take_memory()
    if scene == "mosaic":
        raise ValueError("mosaic: no such photograph")
    return scene.upper()


def test_a_scene_that_needs_too_much_memory_is_given_up_and_the_others_are_done(
    tiny_plan: Callable[..., Plan], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plan, answers = tiny_plan("arcade,blinds"), {}
    with pytest.raises(ValueError, match=r"^arcade: the memory of .* was nearly full \(.*3 times"):
        for scene, answer in for_each_scene(plan, work, tmp_path / "log", trains=True):
            answers[scene] = answer
    assert answers == {"blinds": "BLINDS"}
    assert (tmp_path / "log").read_text(encoding="utf-8").split().count("arcade") == 3
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  arcade: ")]
    assert len(told) == 3 and all("resources.cpus_per_worker" in line for line in told)


def test_what_the_function_raises_is_raised_once_and_last(
    tiny_plan: Callable[..., Plan], tmp_path: Path
):
    plan, answers = replace(tiny_plan("arcade"), scenes=("mosaic", "blinds", "room")), {}
    with pytest.raises(ValueError, match="mosaic: no such photograph"):
        answers |= for_each_scene(plan, work, tmp_path / "log", trains=True)
    assert sorted((tmp_path / "log").read_text(encoding="utf-8").split()) == [
        "blinds",
        "mosaic",
        "room",
    ]


def train_or_take_memory(about: dict[str, Any], plan: Plan) -> None:
    """In place of training: the units of the first configuration take too much memory."""
    (unit,) = about["units"]
    tune.report({"unit": 0, "begun": True})
    if unit["configuration"] == 0:
        take_memory()
    scores = {"val/psnr": 20.0 + unit["configuration"], "val/ssim": 0.5, "val/gain": 0.1}
    tune.report({"unit": 0, "ended": True, "metrics": {"seconds": 1.0, **scores}})


@pytest.mark.slow
def test_a_configuration_that_needs_too_much_memory_fails_and_the_search_goes_on(
    tiny_plan: Callable[..., Plan],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    knob = "field.mlp.width"  # 32 in the preset, which is tried first
    plan = tiny_plan("arcade", method="nerf", trials=3, stopping={"rule": "none"},
                     initial=[{knob: 8}, {knob: 16}],
                     space={knob: {"choices": [8, 16, 32]}})  # fmt: skip
    state = StudyState(plan)
    monkeypatch.setattr(driver, "UnitTrainable", train_or_take_memory)
    driver._search(plan, state, concurrency=2)
    states = [trial.state for trial in state.study.get_trials()]
    assert states == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    best = state.best()
    assert state.is_over and best is not None and best.value == 22
    told = [line for line in capsys.readouterr().out.splitlines() if "nearly full (" in line]
    # Other tests take memory as well; then Ray may end, and the search repeat, another unit.
    assert any(re.match("  #00  arcade( failed)?: the memory of ", line) for line in told)
    assert state.smaller_without_memory({knob: 32}) == 0


def test_any_other_reason_is_the_last_line():
    assert (
        reason("Traceback:\n  File x\nValueError:   no such\tfile\n") == "ValueError: no such file"
    )


def test_the_cause_is_named_when_an_actor_never_ran():
    cause = ActorDiedErrorContext(
        error_message="No space left.", actor_id=bytes(16), never_started=True
    )
    error = ActorDiedError(cause)
    assert str(error).splitlines()[-1].startswith("The actor never ran")
    assert reason(str(error)) == "No space left."

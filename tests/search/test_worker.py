"""What one unit of a study trains, without Ray around it."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_two_ranks

from cbnerf.config import KnobError
from cbnerf.search import worker
from cbnerf.search.plan import Plan, Unit
from cbnerf.search.state import StudyState
from cbnerf.search.worker import (
    UnitTrainable,
    _run_unit,
    run_base_field,
    run_units,
    run_units_together,
    score_best,
)
from cbnerf.training import loop
from cbnerf.training.checkpoint import load_checkpoint
from cbnerf.training.store import write_manifest

pytestmark = pytest.mark.search


def test_scenes_that_share_a_codebook_are_trained_once_and_each_is_scored(
    tiny_plan: Callable[..., Plan],
):
    knobs = {"codebook.shared": True, "field.optim.steps": 4, "refiner.optim.steps": 4}
    plan = tiny_plan("arcade,blinds", trials=1, fixed=knobs, stopping={"rule": "none"})
    state = StudyState(plan)
    unit = state.next_unit()
    assert unit is not None and unit.scene == "all" and state.next_unit() is None
    metrics = _run_unit(plan, unit, torch.device("cpu"))
    state.record(unit, metrics)
    best = state.best()
    assert state.is_over and best is not None
    assert len(list(plan.cache.folder.glob("field-*"))) == 2
    strips = {file.name for file in plan.trial_folder(0, "all").glob("*.png")}
    assert strips == {"strip.png", "strip-1.png"}
    scores = [score_best(plan, plan.base, unit.configuration, scene) for scene in plan.scenes]
    mean = sum(score["refined"]["val/psnr"] for score in scores) / 2
    assert mean == pytest.approx(best.value) and mean == pytest.approx(metrics["val/psnr"])


BEGUN = {"unit": 0, "begun": True}
UNIT = [Unit(0, "arcade", 0, {})._asdict()]


@pytest.mark.parametrize("error", [KnobError("3 is odd"), FloatingPointError("train/loss: nan")])
def test_what_would_fail_again_is_told_and_not_tried_again(tiny_plan, monkeypatch, error):
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(worker, "_run_unit", fail)
    told = list(run_units(UNIT, tiny_plan()))
    assert told == [BEGUN, {"failure": str(error), "out_of_memory": False, "done": True}]


def test_what_may_be_the_machines_fault_is_raised_for_another_machine_to_try(
    tiny_plan, monkeypatch, tmp_path: Path
):
    nowhere = replace(tiny_plan(), data=tmp_path / "not mounted")
    units = run_units(UNIT, nowhere)
    assert next(units) == BEGUN
    with pytest.raises(ValueError, match="no such file"):
        next(units)


def test_sigterm_ends_a_unit_with_a_checkpoint_from_which_another_process_goes_on(
    tiny_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
):
    """The trainable that Tune calls, in a main thread as in Ray's processes."""
    knobs = {"field.optim.steps": 40}
    plan = tiny_plan("arcade", method="nerf", stopping={"rule": "none"}, fixed=knobs,
                     space={"field.optim.lr": {"low": 1e-3, "high": 1e-1}})  # fmt: skip
    steps: list[int] = []

    def count(step: int, *args: Any) -> bool:
        steps.append(step)
        if len(steps) == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        return loop.is_noticed()

    monkeypatch.setattr(loop, "_must_end", count)
    trainable = UnitTrainable.__new__(UnitTrainable)
    trainable.setup({"units": UNIT}, plan)
    assert trainable.step() == BEGUN
    with pytest.raises(SystemExit) as end:
        trainable.step()
    assert end.value.code == 128 + signal.SIGTERM
    place = plan.trial_folder(0, "arcade") / "field.pt"
    assert load_checkpoint(place, "field", torch.device("cpu")).step == steps[-1] == 13
    trainable.reset_config({"units": UNIT})  # as in another process
    assert trainable.step() == BEGUN
    ended = trainable.step()
    assert ended["ended"] and ended["done"] and steps == [*range(1, 14), *range(14, 41)]


def leave_field(folder: Path) -> None:
    (folder / "metrics.json").write_text("{}", encoding="utf-8")
    write_manifest(folder, "float32")


@pytest.mark.parametrize(("method", "before"), [("nerf", []), ("cb-nerf", ["field"])])
def test_workers_train_no_field_beforehand_where_fields_are_searched(
    tiny_plan, monkeypatch, method: str, before: list[str]
):
    trained: list[str] = []

    def train(plan: Plan, what: str, function: Any, about: dict[str, Any], callbacks: Any) -> None:
        trained.append(what)
        if what == "field":
            about["folder"].mkdir(parents=True)
            leave_field(about["folder"])

    monkeypatch.setattr(worker, "_train_together", train)
    monkeypatch.setattr(worker, "TuneReportCallback", object)  # needs Tune around it
    space = {"field.optim.lr": {"low": 1e-3, "high": 1e-1}}
    plan = tiny_plan(method=method, resources={"workers": 2}, space=space)
    run_units_together({"units": UNIT}, plan)
    assert trained == [*before, "units"]


def test_a_field_is_used_once_all_that_another_machine_has_written_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    naps: list[float] = []

    def appear(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            leave_field(tmp_path)

    monkeypatch.setattr(worker.time, "sleep", appear)
    worker._wait_to_see(tmp_path)
    assert len(naps) == 3
    with pytest.raises(OSError, match=r"elsewhere: trained by another machine, and this one does"):
        worker._wait_to_see(tmp_path / "elsewhere")
    assert sum(naps) > 60, "NFS may keep the listing of a folder for a minute"


def look_on_rank(rank: int, plans: list[Plan], told: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{told}/store", rank=rank, world_size=2)
    metrics = _run_unit(plans[rank], Unit(0, "arcade", 0, {}), torch.device("cpu"))
    (told / str(rank)).write_text(str("seconds" in metrics), encoding="utf-8")
    dist.barrier()  # nobody leaves while another still talks
    dist.destroy_process_group()


@pytest.mark.parametrize("method", ["cb-nerf", "nerf"])
def test_workers_take_scenes_and_fields_from_the_view_of_rank_0(
    tiny_plan: Callable[..., Plan], tmp_path: Path, method: str
):
    space = {"field.optim.lr": {"low": 1e-3, "high": 1e-1}}
    plan = tiny_plan("arcade", method=method, space=space, stopping={"rule": "none"})
    if plan.stage == "refiner":  # a group starts when its fields are there
        run_base_field(plan, "arcade")
    told = tmp_path / "told"
    told.mkdir()
    blind = replace(plan, storage=tmp_path / "blind")
    on_two_ranks(look_on_rank, [plan, blind], told)
    assert {(told / rank).read_text(encoding="utf-8") for rank in "01"} == {"True"}
    assert (plan.trial_folder(0, "arcade") / "metrics.json").exists()
    assert not blind.storage.exists()

"""What `--dry-run` says of memory: peaks that earlier trainings have left in the storage."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cbnerf.search.peaks import describe_memory
from cbnerf.search.plan import Plan
from cbnerf.search.worker import run_base_field

pytestmark = pytest.mark.search


@pytest.fixture
def leave_peak(leave_unit: Callable[..., dict[str, float]]) -> Callable[..., None]:
    """Write what a unit of stage 2 leaves that took some gigabytes of a GPU."""

    def leave(plan: Plan, number: int, gigabytes: float, **overrides: Any) -> None:
        metrics = leave_unit(plan, number, "arcade", overrides, 20.0)
        file = plan.trial_folder(number, "arcade") / "metrics.json"
        file.write_text(json.dumps(metrics | {"gpu_bytes": gigabytes * 1e9}), encoding="utf-8")

    return leave


def test_nothing_is_said_where_nothing_comparable_was_measured(
    tiny_plan: Callable[..., Plan], leave_peak, leave_unit
):
    plan = tiny_plan("arcade")
    leave_unit(plan, 0, "arcade", {}, 20.0)  # without a GPU
    leave_peak(tiny_plan("arcade", resolution="x2-128"), 1, 8.0)
    leave_peak(plan, 2, 8.0, **{"codebook.size": 64, "refiner.channels": 4096})
    assert describe_memory(plan) == []


def test_peaks_of_another_study_bound_those_of_the_largest_configuration(
    tiny_plan: Callable[..., Plan], leave_peak
):
    plan = tiny_plan("arcade")  # has at most 1024 codes
    earlier = replace(plan, name="earlier").with_precision("bfloat16")
    largest = {"codebook.beta": 2.0, "loss.lambda_recon": 30.0}
    for number, (size, peak) in enumerate([(64, 2.0), (128, 2.5), (2048, 6.0), (4096, 9.0)]):
        leave_peak(earlier, number, peak, **largest | {"codebook.size": size})
    (line,) = describe_memory(plan)
    assert line.startswith("memory     stage 2 takes at least 2.5 GB, at most 6.0 GB of a GPU")
    assert line.endswith("(measured peaks of 4 earlier trainings)")


def test_the_peak_of_stage_1_is_kept_with_its_metrics(
    tiny_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("cbnerf.training.stages.gpu_peak", lambda: {"gpu_bytes": 3.2e9})
    plan = tiny_plan("arcade")
    run_base_field(plan, "arcade")
    (line,) = describe_memory(plan)
    assert "stage 1 takes at least 3.2 GB" in line

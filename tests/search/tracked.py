"""Studies without training, as their MLflow experiment shows them."""

from collections.abc import Callable

from mlflow import MlflowClient
from mlflow.entities import Run

from cbnerf.search.curves import append_point, begin_curves
from cbnerf.search.mlflow_store import tracking_uri
from cbnerf.search.plan import Plan, Unit
from cbnerf.search.state import StudyState

Leave = Callable[..., dict[str, float]]
"""The fixture `leave_unit`."""


def runs_of(plan: Plan) -> dict[str, Run]:
    """Every run of the study's experiment by its key; a key must not stand twice."""
    client = MlflowClient(tracking_uri(plan.storage))
    experiment = client.get_experiment_by_name(plan.name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    keyed = {run.data.tags["cbnerf.key"]: run for run in runs}
    assert len(keyed) == len(runs)
    return keyed


def statuses_of(plan: Plan) -> dict[str, str]:
    return {key: run.info.status for key, run in runs_of(plan).items()}


def steps_of(plan: Plan, run: Run, metric: str) -> list[tuple[int, float]]:
    history = MlflowClient(tracking_uri(plan.storage)).get_metric_history(run.info.run_id, metric)
    return [(point.step, point.value) for point in history]


def files_of(plan: Plan, run: Run, folder: str = "") -> list[str]:
    client = MlflowClient(tracking_uri(plan.storage))
    return [file.path for file in client.list_artifacts(run.info.run_id, folder or None)]


def begin(state: StudyState, points: dict[int, float] | None = None) -> Unit:
    """The next unit, and the curves of a process that trains it."""
    unit = state.next_unit()
    assert unit is not None
    folder = state.plan.trial_folder(unit.configuration, unit.scene)
    begin_curves(folder)
    for step, psnr in (points or {}).items():
        append_point(folder, step, {"val/psnr": psnr, "train/loss": 1 / step})
    return unit


def train(state: StudyState, leave: Leave, psnr: float | None = None) -> Unit:
    """Train the next unit; of a full training also its files."""
    unit = state.next_unit()
    assert unit is not None
    folder = state.plan.trial_folder(unit.configuration, unit.scene)
    if psnr is None:
        psnr = 20.0 + 2 * state.plan.scenes.index(unit.scene)
    last = max(10 // state.plan.part(unit.rung), 1)  # the preset `tiny` has ten steps
    metrics = {"val/psnr": psnr, "val/ssim": 0.5, "val/gain": 0.25, "seconds": 1.5, "steps": last}
    if unit.rung == state.plan.rungs - 1:
        metrics = leave(state.plan, unit.configuration, unit.scene, unit.overrides, psnr)
    begin_curves(folder)
    for step in (last // 2, last):
        append_point(folder, step, {"val/psnr": psnr * step / last, "train/loss": 1 / step})
    state.record(unit, metrics)
    return unit


def finished(plan: Plan, leave: Leave) -> StudyState:
    """A study whose first configuration has finished."""
    state = StudyState(plan)
    for _ in plan.scenes:
        train(state, leave)
    return state

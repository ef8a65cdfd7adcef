"""The page of MLflow that `tune.py` names, in a real browser."""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
from browser import dump_page, needs_browser
from mlflow_server import free_address, serve_mlflow, stop

from cbnerf.search.mlflow_store import runs_page, tracking_uri
from cbnerf.search.plan import Plan
from cbnerf.search.state import StudyState
from cbnerf.search.tracking import Tracker

pytestmark = [
    pytest.mark.search,
    needs_browser,
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),  # MLflow's
]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Start MLflow's server on a store; returns its address."""
    servers: list[subprocess.Popen[bytes]] = []

    def start(store: str) -> str:
        address = free_address()
        servers.append(serve_mlflow(store, tmp_path, address))
        return address

    yield start
    for server in servers:
        stop(server)


def test_the_printed_page_opens_on_the_configurations_the_best_on_top(
    tiny_plan: Callable[..., Plan],
    leave_unit: Callable[..., dict[str, float]],
    empty_store: Path,
    serve: Callable[[str], str],
    tmp_path: Path,
):
    plan = tiny_plan("arcade", trials=3, stopping={"rule": "none"}).with_precision("float32")
    plan.storage.mkdir()
    shutil.copy(empty_store, plan.storage / "mlflow.db")
    state = StudyState(plan, optuna.create_study(direction="maximize"))
    state.study.set_user_attr("id", "page")
    for psnr in (20.0, 22.0, 21.0):
        unit = state.next_unit()
        assert unit is not None
        about = (unit.configuration, unit.scene, unit.overrides, psnr)
        training = {"codebook/used": 0.5, "train/loss": 0.1}
        state.record(unit, leave_unit(plan, *about) | training)
    tracker = Tracker(state)
    tracker.sync()
    page = f"{serve(tracking_uri(plan.storage))}/{runs_page(tracker.experiment_id, 'val/psnr')}"
    shown = dump_page(page, tmp_path / "browser", "--window-size=1900,1300", budget=40000)
    assert re.findall(r">(configuration \d+|\d+ arcade)<", shown)[:3] == [
        "configuration 01", "configuration 02", "configuration 00",
    ]  # fmt: skip
    assert "<strong>3</strong> matching runs" in shown
    # Charts and images: the means over the scenes before the scenes.
    assert re.findall(r">(codebook|train|val|val_arcade)</div>", shown) == ["val", "val_arcade"]

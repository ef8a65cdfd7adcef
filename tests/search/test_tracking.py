"""The tracker against a real SQLite store; no training."""

import re
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.utils.validation import (
    _validate_metric_name,
    _validate_param_name,
    _validate_tag_name,
)
from sqlalchemy import make_url

from cbnerf.config import save_config
from cbnerf.search.comparison import check_mlflow
from cbnerf.search.ledger import Unit
from cbnerf.search.plan import Plan
from cbnerf.search.tracking import (
    NOT_COMPARABLE,
    Tracker,
    legal_key,
    open_client,
    open_experiment,
    tracking_uri,
)
from cbnerf.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

pytestmark = [
    pytest.mark.search,
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),  # MLflow's
]

KNOBS = {"codebook.size": 64, "codebook.beta": 0.5}
LAST = 2
"""The rung of a whole training."""


@pytest.fixture
def plan(tiny_plan: Callable[..., Plan], empty_store: Path) -> Iterator[Plan]:
    stopping = {"rungs": LAST + 1, "grace_period": 1}
    plan = tiny_plan("arcade,blinds", fixed={"codebook.dim": 8}, stopping=stopping)
    plan = plan.with_precision("bfloat16")
    plan.storage.mkdir()
    shutil.copy(empty_store, plan.storage / "mlflow.db")
    yield plan


def runs_of(plan: Plan) -> dict[str, Run]:
    """Every run of the study's experiment by its key; a key must not stand twice."""
    client = MlflowClient(tracking_uri(plan.storage))
    experiment = client.get_experiment_by_name(plan.name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    keyed = {run.data.tags["cbnerf.key"]: run for run in runs}
    assert len(keyed) == len(runs)
    return keyed


def steps_of(plan: Plan, run: Run, metric: str) -> list[tuple[int, float]]:
    history = MlflowClient(tracking_uri(plan.storage)).get_metric_history(run.info.run_id, metric)
    return [(point.step, point.value) for point in history]


def files_of(plan: Plan, run: Run, folder: str = "") -> list[str]:
    client = MlflowClient(tracking_uri(plan.storage))
    return [file.path for file in client.list_artifacts(run.info.run_id, folder or None)]


def track_unit(tracker: Tracker, plan: Plan, leave: Callable[..., Any], unit: Unit, psnr: float):
    """What a study does for one unit."""
    tracker.start_unit(unit)
    for step in (5, 10):
        tracker.log_step(unit, {"val/psnr": psnr * step / 10, "train/loss": 1 / step}, step)
    metrics = leave(plan, unit.configuration, unit.scene, unit.overrides, psnr)
    tracker.end_unit(unit, metrics)
    return metrics


def track_configuration(tracker: Tracker, plan: Plan, leave: Callable[..., Any], number: int):
    results = {
        scene: track_unit(tracker, plan, leave, Unit(number, scene, LAST, KNOBS), 20.0 + 2 * place)
        for place, scene in enumerate(plan.scenes)
    }
    tracker.end_configuration(number, results)


def test_a_configuration_is_a_run_with_its_knobs_and_means(plan: Plan, leave_unit):
    track_configuration(Tracker(plan, "one"), plan, leave_unit, 0)
    run = runs_of(plan)["configuration/0"]
    assert run.info.status == "FINISHED" and run.info.run_name == "configuration 00"
    assert run.data.params == {
        "method": "cb-nerf", "resolution": "tiny", "codebook.dim": "8", "codebook.size": "64",
        "codebook.beta": "0.5", "precision": "bfloat16",
    }  # fmt: skip
    assert run.data.metrics == {
        "val/psnr": 21.0, "val/ssim": 0.5, "val/gain": 0.25, "seconds": 1.5,
        "arcade/psnr": 20.0, "arcade/gain": 0.25, "blinds/psnr": 22.0, "blinds/gain": 0.25,
    }  # fmt: skip
    assert any("arcade" in file for file in files_of(plan, run, "images"))


def test_a_scene_is_a_child_with_curves_strip_and_weights(plan: Plan, leave_unit):
    track_configuration(Tracker(plan, "one"), plan, leave_unit, 3)
    runs = runs_of(plan)
    child = runs["unit/3/arcade"]
    assert child.data.tags["mlflow.parentRunId"] == runs["configuration/3"].info.run_id
    assert child.info.status == "FINISHED"
    assert child.data.params == {"scene": "arcade", "codebook.size": "64", "codebook.beta": "0.5"}
    # The last value stands at the last step and nowhere else.
    assert steps_of(plan, child, "val/psnr") == [(5, 10.0), (10, 20.0)]
    assert steps_of(plan, child, "seconds") == [(10, 1.5)]
    assert {"config.yaml", "refiner.pt"} <= set(files_of(plan, child))
    assert any("strip" in file for file in files_of(plan, child, "images"))


def test_stage_1_runs_are_linked_to_the_runs_that_use_them(plan: Plan, leave_unit, tmp_path: Path):
    tracker = Tracker(plan, "one")
    entry = tmp_path / "field-arcade-0123"
    entry.mkdir()
    save_config(plan.base, entry / "config.yaml")
    weights = {"planes": torch.ones(2)}
    adam = {"state": {0: {"exp_avg": torch.ones(2)}}}
    save_checkpoint(
        Checkpoint("field", "arcade", 20, plan.base, "float32", weights, adam, {}),
        entry / "field.pt",
    )
    for _ in range(2):  # A study that goes on logs the cached field again.
        tracker.log_field("arcade", entry, {"val/psnr": 19.0, "seconds": 3.0})
    tracker.start_unit(Unit(0, "arcade", LAST, KNOBS))
    runs = runs_of(plan)
    field = runs["field/field-arcade-0123"]
    assert runs["unit/0/arcade"].data.tags["cbnerf.field_run"] == field.info.run_id
    assert field.info.status == "FINISHED" and "mlflow.parentRunId" not in field.data.tags
    assert field.data.params["field.kind"] == "planes"
    assert field.data.params["precision"] == "bfloat16"
    assert not any(name.startswith("codebook.") for name in field.data.params)
    assert steps_of(plan, field, "val/psnr") == [(plan.base.field.optim.steps, 19.0)]
    logged = MlflowClient(tracking_uri(plan.storage)).download_artifacts(
        field.info.run_id, "field.pt", str(tmp_path)
    )
    checkpoint = load_checkpoint(Path(logged), "field", torch.device("cpu"))
    assert torch.equal(checkpoint.model["planes"], weights["planes"]) and not checkpoint.optimizer


def test_runs_of_built_in_scenes_say_that_they_compare_with_nothing(plan: Plan, leave_unit):
    track_configuration(Tracker(plan, "one"), plan, leave_unit, 0)
    for run in runs_of(plan).values():
        assert run.data.tags["cbnerf.warning"] == NOT_COMPARABLE
        assert run.data.tags["cbnerf.study"] == plan.name


def test_a_restarted_study_adds_to_its_runs(plan: Plan, leave_unit):
    first = Tracker(plan, "one")
    track_configuration(first, plan, leave_unit, 0)
    first.start_unit(Unit(1, "arcade", LAST, KNOBS))
    first.log_step(Unit(1, "arcade", LAST, KNOBS), {"val/psnr": 5.0}, 5)
    before = runs_of(plan)
    second = Tracker(plan, "one")
    second.start_unit(Unit(1, "arcade", LAST, KNOBS))
    second.log_step(Unit(1, "arcade", LAST, KNOBS), {"val/psnr": 9.0}, 10)
    after = runs_of(plan)
    assert {key: run.info.run_id for key, run in after.items()} == {
        key: run.info.run_id for key, run in before.items()
    }
    assert steps_of(plan, after["unit/1/arcade"], "val/psnr") == [(5, 5.0), (10, 9.0)]
    assert after["configuration/0"].info.status == "FINISHED"


def test_ending_a_unit_twice_doubles_nothing(plan: Plan, leave_unit):
    """A kill between MLflow and the journal makes the next life end the unit once more."""
    unit = Unit(0, "arcade", LAST, KNOBS)
    metrics = track_unit(Tracker(plan, "one"), plan, leave_unit, unit, 20.0)
    second = Tracker(plan, "one")
    second.start_unit(unit)
    second.end_unit(unit, metrics)
    run = runs_of(plan)["unit/0/arcade"]
    assert run.info.status == "FINISHED"
    assert steps_of(plan, run, "val/psnr") == [(5, 10.0), (10, 20.0)]


def test_a_study_made_anew_leaves_the_runs_of_its_namesake_alone(plan: Plan, leave_unit):
    track_configuration(Tracker(plan, "one"), plan, leave_unit, 0)
    other = Tracker(plan, "two")
    other.start_unit(Unit(0, "arcade", LAST, {"codebook.size": 1024}))
    client = MlflowClient(tracking_uri(plan.storage))
    runs = client.search_runs([other.experiment_id], "tags.`cbnerf.key` = 'configuration/0'")
    assert {run.data.params["codebook.size"] for run in runs} == {"64", "1024"}


def test_an_interrupt_marks_open_runs_as_killed(plan: Plan, leave_unit):
    tracker = Tracker(plan, "one")
    track_configuration(tracker, plan, leave_unit, 0)
    unit = Unit(1, "arcade", LAST, KNOBS)
    tracker.start_unit(unit)
    tracker.interrupt()
    statuses = {key: run.info.status for key, run in runs_of(plan).items()}
    assert statuses == {
        "configuration/0": "FINISHED", "unit/0/arcade": "FINISHED", "unit/0/blinds": "FINISHED",
        "configuration/1": "KILLED", "unit/1/arcade": "KILLED",
    }  # fmt: skip
    again = Tracker(plan, "one")
    again.start_unit(unit)
    opened = runs_of(plan)
    assert {opened[key].info.status for key in ("configuration/1", "unit/1/arcade")} == {"RUNNING"}


def test_a_failed_unit_fails_its_configuration_and_says_why(plan: Plan, leave_unit):
    tracker = Tracker(plan, "one")
    good = track_unit(tracker, plan, leave_unit, Unit(0, "arcade", LAST, KNOBS), 20.0)
    bad = Unit(0, "blinds", LAST, KNOBS)
    tracker.start_unit(bad)
    tracker.end_unit(bad, None)
    tracker.explain_failure(bad, "train/loss not finite")
    tracker.end_configuration(0, {"arcade": good, "blinds": None})
    runs = runs_of(plan)
    assert runs["unit/0/arcade"].info.status == "FINISHED"
    assert runs["unit/0/blinds"].info.status == "FAILED"
    assert runs["unit/0/blinds"].data.tags["mlflow.note.content"] == "train/loss not finite"
    assert runs["configuration/0"].info.status == "FAILED"
    assert "val/psnr" not in runs["configuration/0"].data.metrics


def test_the_report_is_one_run_with_its_files(plan: Plan, tmp_path: Path):
    file = tmp_path / "report.md"
    file.write_text("# Study", encoding="utf-8")
    for _ in range(2):
        Tracker(plan, "one").log_report([file], {"val/psnr": 21.0})
    run = runs_of(plan)["report"]
    assert files_of(plan, run) == ["report.md"]
    assert steps_of(plan, run, "val/psnr") == [(0, 21.0)]


def test_a_lower_rung_leaves_its_curve_and_nothing_else(plan: Plan):
    tracker = Tracker(plan, "one")
    unit = Unit(0, "arcade", 0, KNOBS)
    tracker.start_unit(unit)
    tracker.log_step(unit, {"val/psnr": 15.0}, 1)
    tracker.end_unit(unit, {"val/psnr": 15.0, "seconds": 1.0})
    child = runs_of(plan)["unit/0/arcade"]
    assert child.info.status == "RUNNING" and not files_of(plan, child)
    assert steps_of(plan, child, "val/psnr") == [(1, 15.0)]


def test_a_stopped_configuration_ends_as_killed_and_says_why(plan: Plan):
    tracker = Tracker(plan, "one")
    tracker.start_unit(Unit(0, "arcade", 0, KNOBS))
    assert not tracker.is_closed(0)
    tracker.stop_configuration(0, "1.2% to beat #00 after 1 units")
    runs = runs_of(plan)
    assert {runs[key].info.status for key in ("configuration/0", "unit/0/arcade")} == {"KILLED"}
    assert "1.2% to beat" in runs["configuration/0"].data.tags["mlflow.note.content"]
    assert Tracker(plan, "one").is_closed(0)


OPEN = (
    "import sys, pathlib; from cbnerf.search.tracking import open_client; "
    "print(len(open_client(pathlib.Path(sys.argv[1])).search_experiments()))"
)


def test_a_database_is_made_whole_by_one_of_many_and_whoever_is_killed(tmp_path: Path):
    command = [sys.executable, "-W", "ignore", "-c", OPEN, str(tmp_path)]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not list(tmp_path.glob(".mlflow.db.*")):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.01)
    others = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    killed.kill()
    killed.communicate()
    assert not (tmp_path / "mlflow.db").exists()
    for other in others:
        output, errors = other.communicate()
        assert (other.returncode, output) == (0, "1\n"), errors
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", "mlflow.lock"}


ODD_NAMES = ["a b", "a%b", "a%20b", "a?b=c", "a#b", "küche", "it's", 'a"b', "a;b&c"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_storage_of_any_name_holds_its_database_and_artifacts(
    name: str, tmp_path: Path, empty_store: Path
):
    storage = tmp_path / name
    storage.mkdir()
    shutil.copy(empty_store, storage / "mlflow.db")
    client = open_client(storage)
    run = client.create_run(open_experiment(client, "one", storage, {})).info.run_id
    client.log_text(run, "text", "note.txt")
    again = MlflowClient(tracking_uri(storage))
    assert [file.path for file in again.list_artifacts(run)] == ["note.txt"]
    # MLflow itself makes an empty folder by the name of a quoted path.
    others = [path for path in tmp_path.iterdir() if path.name != name]
    assert not others or (re.search("[%?]", name) and not list(others[0].iterdir()))
    assert make_url(tracking_uri(storage)).database == str(storage / "mlflow.db")
    assert {"mlflow.db", "mlartifacts"} <= {path.name for path in storage.iterdir()}


def test_a_storage_that_moves_takes_its_artifacts_along(tmp_path: Path, empty_store: Path):
    old, new = tmp_path / "old", tmp_path / "new place"
    old.mkdir()
    shutil.copy(empty_store, old / "mlflow.db")
    client = open_client(old)
    first = client.create_run(open_experiment(client, "küche", old, {})).info.run_id
    client.log_text(first, "before", "first.txt")
    old.rename(new)
    client = open_client(new)
    experiment = open_experiment(client, "küche", new, {})
    second = client.create_run(experiment).info.run_id
    client.log_text(second, "after", "second.txt")
    for run, file in ((first, "first.txt"), (second, "second.txt")):
        assert [found.path for found in client.list_artifacts(run)] == [file]
        assert Path(client.download_artifacts(run, file)).is_file()
    assert not old.exists()
    assert {location(client, run) for run in (first, second)} == {
        (new / "mlartifacts" / "küche").as_uri()
    }


def location(client: MlflowClient, run: str) -> str:
    uri = client.get_run(run).info.artifact_uri
    assert uri is not None
    return uri.removesuffix(f"/{run}/artifacts")


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.lists(st.text(min_size=1), min_size=2, max_size=2, unique=True))
def test_different_names_have_different_legal_keys(names: list[str]):
    keys = [legal_key(name) for name in names]
    assert len(set(keys)) == 2
    for key in keys:
        assert re.fullmatch(r"[\w\-. ]+", key, re.ASCII)  # what images allow, without slashes
        _validate_metric_name(f"{key}/psnr")
        _validate_param_name(f"{key}/psnr")
        _validate_tag_name(f"{key}/psnr")


@pytest.mark.parametrize("name", ["fern", "arcade", "my scene-2_b.v1"])
def test_legal_names_stay_as_they_are(name: str):
    assert legal_key(name) == name


@pytest.mark.parametrize("name", ["@low-res", "val", "mean"])
def test_illegal_names_and_those_of_our_own_metrics_are_changed(name: str):
    assert legal_key(name) != name


@pytest.mark.parametrize("name", ["garden(1)", "küche", "street, north"])
def test_a_scene_of_any_name_has_metrics_and_images(plan: Plan, leave_unit, name: str):
    plan = replace(plan, scenes=(name,))
    track_configuration(Tracker(plan, "one"), plan, leave_unit, 0)
    run = runs_of(plan)["configuration/0"]
    assert run.data.metrics[f"{legal_key(name)}/psnr"] == 20.0
    assert any(legal_key(name) in file for file in files_of(plan, run, "images"))


def test_a_damaged_database_is_named_and_left_as_it_is(tmp_path: Path):
    file = tmp_path / "mlflow.db"
    file.write_bytes(b"not a database" * 1000)
    with pytest.raises(ValueError, match=re.escape(f"{file}: not a database of this MLflow")):
        open_client(tmp_path)
    with pytest.raises(ValueError, match=re.escape(str(file))):
        check_mlflow(tmp_path)
    assert file.read_bytes() == b"not a database" * 1000


def test_a_missing_driver_is_named(tmp_path: Path, monkeypatch):
    if find_spec("psycopg") or find_spec("psycopg2"):
        pytest.skip("a driver is installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@127.0.0.1:9/runs")
    with pytest.raises(ValueError, match="needs the Python package psycopg") as refusal:
        open_client(tmp_path)
    assert "secret" not in str(refusal.value)


class _Searches(BaseHTTPRequestHandler):
    """Answers as a tracking server without experiments does."""

    def do_POST(self) -> None:
        body = b'{"experiments": []}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *about: Any) -> None:
        pass


@pytest.fixture
def own_certificate(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of an https server, and the certificate that it signed itself."""
    certificate, key = tmp_path / "own.crt", tmp_path / "own.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
         "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Searches)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"https://localhost:{server.server_address[1]}", certificate
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate by openssl")
def test_a_server_with_its_own_certificate_is_trusted_as_mlflow_is_told(
    own_certificate: tuple[str, Path], tmp_path: Path, monkeypatch
):
    address, certificate = own_certificate
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(ValueError, match="(?i)certificate"):
        open_client(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificate))
    assert open_client(tmp_path).search_experiments() == []


def test_a_server_that_does_not_answer_is_named_at_once(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    with pytest.raises(ValueError, match=r"no server answers at http://127\.0\.0\.1:9") as refusal:
        open_client(tmp_path)
    assert "secret" not in str(refusal.value)
    assert not list(tmp_path.iterdir())

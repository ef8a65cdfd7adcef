"""A comparison's report in a real SQLite store."""

import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cbnerf.search.comparison import log_comparison
from cbnerf.search.mlflow_store import legal_key, tracking_uri

pytestmark = [
    pytest.mark.search,
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),  # MLflow's
]


def write_report(folder: Path, protocol: str, metric: str, rows: int = 1) -> Path:
    scenes = {"fern": {"summary": {metric: 20.0}}, "room": {"summary": {metric: 30.0}}}
    content = {
        "protocol": protocol, "resolution": "x2-504", "data": "photos", "device": "a CPU",
        "precision": "float32",
        "scenes": ["fern", "room"], "methods": {"cb-nerf": {}},
        "rows": {f"cb-nerf {n}": {"mean": {metric: 25.0}, "scenes": scenes} for n in range(rows)},
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "crops.png").write_bytes(b"png")
    return folder


def test_protocols_have_different_columns(tmp_path: Path, empty_store: Path):
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    client = MlflowClient(tracking_uri(tmp_path))
    found = {}
    for protocol, metric in (("holdout", "psnr"), ("unseen-scene", "psnr"),
                             ("table1", "psnr_table1")):  # fmt: skip
        run = client.get_run(
            log_comparison(write_report(tmp_path / protocol, protocol, metric), tmp_path)
        )
        assert run.info.status == "FINISHED" and run.info.run_name == protocol
        assert run.data.params["precision"] == "float32"
        assert run.data.params["protocol"] == protocol and run.data.params["scenes"] == "fern,room"
        assert run.data.metrics[f"{protocol}/cb-nerf 0/mean/{metric}"] == 25.0
        assert run.data.metrics[f"{protocol}/cb-nerf 0/room/{metric}"] == 30.0
        files = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert files == {"report.json", "crops.png"}
        found[protocol] = set(run.data.metrics)
    assert not found["holdout"] & found["unseen-scene"]
    assert not found["holdout"] & found["table1"]


def test_a_large_comparison_is_logged_whole(tmp_path: Path, empty_store: Path):
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    run = log_comparison(write_report(tmp_path / "large", "holdout", "psnr", 350), tmp_path)
    assert len(MlflowClient(tracking_uri(tmp_path)).get_run(run).data.metrics) == 1050


def test_scenes_and_methods_may_have_any_name(tmp_path: Path, empty_store: Path):
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    scenes = {"mean": 10.0, "garden(1)": 20.0, "street, north": 30.0, "küche": 40.0}
    folder = write_report(tmp_path / "odd", "holdout", "psnr")
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    scored = {scene: {"summary": {"psnr": psnr}} for scene, psnr in scenes.items()}
    report |= {"scenes": list(scenes), "methods": {"küche (2) best": {}}}
    report["rows"] = {"vq-vae of küche (2) best": {"mean": {"psnr": 25.0}, "scenes": scored}}
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    run = MlflowClient(tracking_uri(tmp_path)).get_run(log_comparison(folder, tmp_path))
    row = f"holdout/{legal_key('vq-vae of küche (2) best')}"
    wanted = {f"{row}/{legal_key(scene)}/psnr": psnr for scene, psnr in scenes.items()}
    assert run.data.metrics == wanted | {f"{row}/mean/psnr": 25.0}

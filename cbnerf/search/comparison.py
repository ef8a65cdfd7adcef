"""A comparison in MLflow: one run with its metrics, and its report as artifacts.

The name of every metric starts with the protocol, so that MLflow's tables keep protocols apart.
"""

import json
import time
from pathlib import Path

from mlflow.entities import Metric

from cbnerf.search.mlflow_store import legal_key, open_client, open_experiment, plain_errors
from cbnerf.search.runs import log_batch

EXPERIMENT = "comparisons"


def check_mlflow(storage: Path) -> None:
    """Raise ValueError if a comparison could not be logged."""
    with plain_errors():
        open_experiment(open_client(storage), EXPERIMENT, storage, {})


@plain_errors()
def log_comparison(folder: Path, storage: Path) -> str:
    """Log the report in `folder`; returns the id of its run. Raises ValueError if MLflow fails."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    client = open_client(storage)
    experiment = open_experiment(client, EXPERIMENT, storage, {})
    run = client.create_run(experiment, run_name=folder.name)
    now = int(time.time() * 1000)
    about = ("protocol", "resolution", "data", "device", "precision")
    params = {name: str(report[name]) for name in about}
    params |= {"scenes": ",".join(report["scenes"]), "methods": ",".join(report["methods"])}
    metrics = [
        Metric(f"{report['protocol']}/{legal_key(row)}/{scene}/{name}", value, now, 0)
        for row, entry in report["rows"].items()
        for scene, values in _metrics_by_scene(entry).items()
        for name, value in values.items()
    ]
    log_batch(client, run.info.run_id, metrics, params)
    client.log_artifacts(run.info.run_id, str(folder))
    client.set_terminated(run.info.run_id)
    return run.info.run_id


def _metrics_by_scene(entry: dict) -> dict[str, dict[str, float]]:
    """Metrics of each scene, and their means as `mean`."""
    scenes = {legal_key(scene): scored["summary"] for scene, scored in entry["scenes"].items()}
    return {"mean": entry["mean"], **scenes}

"""A comparison in MLflow: one run with its numbers and its report as artifacts.

The protocol stands in the name of every metric, so that MLflow's tables keep protocols apart.
"""

import json
import time
from pathlib import Path

from mlflow.entities import Metric, Param

from cbnerf.search.mlflow_store import legal_key, open_client, open_experiment, plain_errors

EXPERIMENT = "comparisons"


def check_mlflow(storage: Path) -> None:
    """Raise ValueError where a comparison could not be logged."""
    with plain_errors():
        open_experiment(open_client(storage), EXPERIMENT, storage, {})


@plain_errors()
def log_comparison(folder: Path, storage: Path) -> str:
    """Log the report in `folder`; returns the id of its run. ValueError where it cannot be."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    client = open_client(storage)
    experiment = open_experiment(client, EXPERIMENT, storage, {})
    run = client.create_run(experiment, run_name=folder.name)
    now = int(time.time() * 1000)
    about = ("protocol", "resolution", "data", "device", "precision")
    params = {name: report[name] for name in about}
    params |= {"scenes": ",".join(report["scenes"]), "methods": ",".join(report["methods"])}
    metrics = [
        Metric(f"{report['protocol']}/{legal_key(row)}/{place}/{name}", value, now, 0)
        for row, entry in report["rows"].items()
        for place, values in _places(entry).items()
        for name, value in values.items()
    ]
    client.log_batch(run.info.run_id, metrics[:900], [Param(k, str(v)) for k, v in params.items()])
    for start in range(900, len(metrics), 900):  # MLflow takes 1000 at a time
        client.log_batch(run.info.run_id, metrics[start : start + 900])
    client.log_artifacts(run.info.run_id, str(folder))
    client.set_terminated(run.info.run_id)
    return run.info.run_id


def _places(entry: dict) -> dict[str, dict[str, float]]:
    """Metrics of each scene and of their mean, by its part of a key."""
    scenes = {legal_key(scene): scored["summary"] for scene, scored in entry["scenes"].items()}
    return {"mean": entry["mean"], **scenes}

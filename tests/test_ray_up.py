"""`ray up` for real: three hosts made of network namespaces, a study on them, `ray down`."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hosts import HOSTS, ROOT, SHARED, Hosts, run, started_hosts, study_in_mlflow

ALL_JOINED = """
import ray, time
ray.init("auto", log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < 3: time.sleep(1)
"""


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with started_hosts(tmp_path) as hosts:
        yield hosts


def cluster_file(hosts: Hosts) -> Path:
    """cluster.yaml and its overlay for machines of one's own, with these machines in it; what a
    fresh machine would install is here already."""
    parts = [
        yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))
        for file in ("cluster.yaml", "clusters/hosts.yaml")
    ]
    cluster: dict[str, Any] = parts[0] | parts[1]
    head, *workers = HOSTS.values()
    cluster["provider"] |= {"head_ip": head, "worker_ips": workers}
    cluster["auth"] = {"ssh_user": "root", "ssh_private_key": str(hosts.folder / "key")}
    mounts = cluster["file_mounts"].items()
    cluster["file_mounts"] = {remote: str(ROOT / local) for remote, local in mounts}
    *_, profile = cluster["setup_commands"]
    cluster["setup_commands"] = [f"ln -sfn {sys.prefix} ~/venv", profile]
    file = hosts.folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(cluster), encoding="utf-8")
    return file


@pytest.mark.cluster
@pytest.mark.search
def test_a_study_runs_on_the_machines_that_ray_up_starts(hosts: Hosts):
    ray, cluster = Path(sys.executable).parent / "ray", cluster_file(hosts)
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}

    def on_head(command: str) -> str:
        return run(ray, "exec", cluster, command, env=environment)

    # Few and long units, one for each machine at a time: Tune gives a unit whose worker is starting
    # to one that is free, so a machine that starts last gets none while they are short.
    smoke = (ROOT / "tune_configs" / "smoke.yaml").read_text(encoding="utf-8")
    longer = smoke.replace("trials: 2", "trials: 3") + "fixed: {refiner.optim.steps: 150}\n"
    longer += f"resources: {{cpus_per_worker: {os.cpu_count()}}}\n"
    (hosts.folder / "shared" / "search.yaml").write_text(longer, encoding="utf-8")
    output = run(ray, "up", "-y", "--no-config-cache", cluster, env=environment)
    assert "cbnerf is up. Next" in output
    try:
        on_head(f"timeout 200 {sys.executable} -c '{ALL_JOINED}'")
        search = f"--config {SHARED}/search.yaml --scenes arcade,blinds --address auto"
        submitted = on_head(f"ray job submit -- python ~/cbnerf/tune.py {search}")
        assert "succeeded" in submitted, submitted[-3000:]
        study = study_in_mlflow("head", "http://127.0.0.1:5000")
    finally:
        run(ray, "down", "-y", cluster, env=environment)
    assert study["kinds"] == {"configuration": 3, "scene": 6, "field": 2, "report": 1}
    assert study["statuses"] == ["FINISHED"]
    assert {"first", "second"} <= set(study["nodes"])
    assert (hosts.folder / "shared" / "studies" / study["name"] / "best.yaml").exists()

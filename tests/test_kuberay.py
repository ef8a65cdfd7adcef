"""clusters/kuberay.yaml, held against KubeRay's schema, Ray's autoscaler and the command line; the
commands of its pods run for real on three hosts made of network namespaces."""

import re
import secrets
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from hosts import HOSTS, ROOT, SHARED, Hosts, started_hosts, study_in_mlflow

pytestmark = pytest.mark.search
pytest.importorskip("ray")

FILE = ROOT / "clusters" / "kuberay.yaml"
SCHEMA = "shared/schemas/ray.io_rayjobs.yaml"
HEAD_SERVICE = "cbnerf-head-svc.default.svc.cluster.local"
Record = dict[str, Any]


@pytest.fixture(scope="module")
def objects() -> dict[tuple[str, str], Record]:
    """The objects of the file, by kind and name."""
    found = list(yaml.safe_load_all(FILE.read_text(encoding="utf-8")))
    return {(one["kind"], one["metadata"]["name"]): one for one in found}


@pytest.fixture(scope="module")
def job(objects: dict[tuple[str, str], Record]) -> Record:
    return objects["RayJob", "cbnerf"]["spec"]


@pytest.fixture(scope="module")
def schema() -> Record:
    """KubeRay's schema of a RayJob, closed: an unknown key is an error."""
    place = next((up / SCHEMA for up in ROOT.parents if (up / SCHEMA).exists()), None)
    if place is None:
        pytest.skip(f"no ../{SCHEMA} beside the project")
    (version,) = [
        version
        for version in yaml.safe_load(place.read_text(encoding="utf-8"))["spec"]["versions"]
        if version["name"] == "v1"
    ]
    return _closed(version["schema"]["openAPIV3Schema"])


def _closed(schema: Any) -> Any:
    """As the API server with strict validation: keys beyond `properties` are refused. `metadata`
    has a schema of its own there, which the definition leaves out."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(part) for key, part in schema.items()}
    if isinstance(closed.get("properties"), dict):
        closed.setdefault("additionalProperties", False)
    return closed


def pods(job: Record) -> dict[str, Record]:
    """The pod templates of a job, by what runs in them."""
    cluster = job["rayClusterSpec"]
    workers = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {
        "submitter": job["submitterPodTemplate"],
        "head": cluster["headGroupSpec"]["template"],
        **workers,
    }


def all_pods(objects: dict[tuple[str, str], Record]) -> dict[str, Record]:
    mlflow = objects["Deployment", "cbnerf-mlflow"]["spec"]["template"]
    return pods(objects["RayJob", "cbnerf"]["spec"]) | {"mlflow": mlflow}


def the_container(pod: Record) -> Record:
    (container,) = pod["spec"]["containers"]
    return container


def settings() -> dict[str, str]:
    """What clusters/settings.sh exports."""
    text = (ROOT / "clusters" / "settings.sh").read_text(encoding="utf-8")
    found = dict(re.findall(r"^export (\w+)=(\S*)", text, re.MULTILINE))
    return {name: re.sub(r"\$\{\w+:-(.*)\}", r"\1", value) for name, value in found.items()}


def test_kuberay_accepts_the_job(objects: dict[tuple[str, str], Record], schema: Record):
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft7Validator(schema)
    job = objects["RayJob", "cbnerf"]
    assert [f"{list(e.path)}: {e.message}" for e in validator.iter_errors(job)] == []
    # The schema of pods is that of Kubernetes.
    groups = schema["properties"]["spec"]["properties"]["rayClusterSpec"]["properties"]
    of_pods = groups["headGroupSpec"]["properties"]["template"]
    mlflow = objects["Deployment", "cbnerf-mlflow"]["spec"]["template"]
    jsonschema.Draft7Validator(of_pods).validate(mlflow)
    mlflow["spec"]["containers"][0]["volumeMount"] = []
    try:
        with pytest.raises(jsonschema.ValidationError, match="volumeMount"):
            jsonschema.Draft7Validator(of_pods).validate(mlflow)
    finally:
        del mlflow["spec"]["containers"][0]["volumeMount"]


def test_the_job_ends_with_its_search_and_starts_without_workers(job: Record):
    assert job["shutdownAfterJobFinishes"] and job["ttlSecondsAfterFinished"] > 0
    cluster = job["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] and cluster["autoscalerOptions"]["version"] == "v2"
    assert {pod["spec"]["restartPolicy"] for pod in pods(job).values()} == {"Never"}
    groups = cluster["workerGroupSpecs"]
    assert all(group["minReplicas"] == 0 and not group.get("replicas") for group in groups)
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_kueue_would_accept_the_job(objects: dict[tuple[str, str], Record], job: Record):
    """The rules of its webhook for Ray jobs."""
    about = objects["RayJob", "cbnerf"]["metadata"]
    assert about["labels"]["kueue.x-k8s.io/queue-name"]
    assert about["annotations"]["kueue.x-k8s.io/elastic-job"] == "true"  # It is autoscaled.
    groups = job["rayClusterSpec"]["workerGroupSpecs"]
    assert len(groups) <= 7 and "head" not in [group["groupName"] for group in groups]
    assert "clusterSelector" not in job and job["suspend"] is False


def test_versions_are_those_that_were_tested(job: Record):
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"ray=={job['rayClusterSpec']['rayVersion']}" in constraints


def test_the_job_gives_options_that_tune_py_has(job: Record):
    tyro = pytest.importorskip("tyro")
    from cbnerf.search.request import Options

    program, script, *arguments = shlex.split(job["entrypoint"])
    assert (program, script) == ("python", "~/cbnerf/tune.py")
    options = tyro.cli(Options, args=arguments)
    assert (options.scenes, options.address, options.gpus) == ("all", "auto", 0.25)


def test_settings_are_those_of_the_other_clusters(objects: dict[tuple[str, str], Record]):
    here, there = objects["ConfigMap", "cbnerf"]["data"], settings()
    differ = {name for name, value in here.items() if there[name] != value}
    assert differ == {"MLFLOW_TRACKING_URI"}
    # KubeRay has keys of its own for these.
    assert there.keys() - here.keys() == {"CBNERF_NFS", "RAY_AUTH_MODE"}


def test_every_mount_has_its_volume_and_every_volume_its_claim(
    objects: dict[tuple[str, str], Record],
):
    claims = {name for kind, name in objects if kind == "PersistentVolumeClaim"}
    maps = {name for kind, name in objects if kind == "ConfigMap"}
    used = set()
    for pod in all_pods(objects).values():
        volumes = {
            volume["name"]: volume["persistentVolumeClaim"]["claimName"]
            for volume in pod["spec"].get("volumes", [])
        }
        container = the_container(pod)
        mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
        assert mounted == set(volumes)
        assert {source["configMapRef"]["name"] for source in container.get("envFrom", [])} <= maps
        used |= set(volumes.values())
    assert used == claims
    storage = objects["ConfigMap", "cbnerf"]["data"]["CBNERF_STORAGE"]
    for name, pod in pods(objects["RayJob", "cbnerf"]["spec"]).items():
        mounts = the_container(pod).get("volumeMounts", [])
        assert storage in [mount["mountPath"] for mount in mounts] or name == "submitter"
    shared = objects["PersistentVolumeClaim", "cbnerf"]["spec"]["accessModes"]
    assert shared == ["ReadWriteMany"]


def test_the_service_leads_to_mlflow_and_mlflow_answers_to_its_name(
    objects: dict[tuple[str, str], Record],
):
    service, policy = (objects[kind, "cbnerf-mlflow"] for kind in ("Service", "NetworkPolicy"))
    pod = objects["Deployment", "cbnerf-mlflow"]["spec"]["template"]
    container, labels = the_container(pod), pod["metadata"]["labels"]
    (port,), (open_port,) = service["spec"]["ports"], container["ports"]
    address = objects["ConfigMap", "cbnerf"]["data"]["MLFLOW_TRACKING_URI"]
    assert address == f"http://{service['metadata']['name']}:{port['port']}"
    assert service["spec"]["type"] == "ClusterIP"
    assert service["spec"]["selector"] == labels == policy["spec"]["podSelector"]["matchLabels"]
    assert port["targetPort"] == open_port["name"]
    assert f"--port {open_port['containerPort']}" in container["args"][0]
    environment = {entry["name"]: entry for entry in container["env"]}
    hosts = environment["MLFLOW_SERVER_ALLOWED_HOSTS"]["value"].split(",")
    assert address.removeprefix("http://") in hosts and "*" not in hosts
    ((allowed,),) = [rule["from"] for rule in policy["spec"]["ingress"]]
    assert pods(objects["RayJob", "cbnerf"]["spec"])["head"]["metadata"]["labels"].items() >= (
        allowed["podSelector"]["matchLabels"].items()
    )


def test_pods_run_without_rights_and_within_limits(objects: dict[tuple[str, str], Record]):
    """What the Pod Security Standard `restricted` asks for, and limits that GPUs need."""
    for pod in all_pods(objects).values():
        assert pod["spec"]["securityContext"].items() >= {"runAsNonRoot": True}.items()
        assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        container = the_container(pod)
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        requests, limits = (container["resources"][kind] for kind in ("requests", "limits"))
        assert requests.keys() == limits.keys() >= {"cpu", "memory"}
        if gpus := requests.get("nvidia.com/gpu"):
            assert gpus == limits["nvidia.com/gpu"]
            tolerated = [taint["key"] for taint in pod["spec"]["tolerations"]]
            assert "nvidia.com/gpu" in tolerated


def test_the_file_holds_no_secret_and_all_pods_share_ray_s_token(
    objects: dict[tuple[str, str], Record], job: Record
):
    assert "Secret" not in {kind for kind, _ in objects}
    assert job["rayClusterSpec"]["authOptions"] == {"mode": "token"}  # KubeRay hands it out.
    for pod in all_pods(objects).values():
        for entry in the_container(pod).get("env", []):
            assert not re.search("TOKEN|PASSWORD|KEY|AUTH", entry["name"])
    environment = the_container(all_pods(objects)["mlflow"])["env"]
    (database,) = [e for e in environment if e["name"] == "MLFLOW_BACKEND_STORE_URI"]
    assert database["valueFrom"]["secretKeyRef"]["optional"] and "value" not in database


@pytest.mark.parametrize(
    ("units", "groups", "started"),
    [
        (1, [], {"gpu": 1}),
        (8, [], {"gpu": 2}),
        (99, [], {"gpu": 8, "four-gpus": 2}),
        (20, [], {"four-gpus": 1, "gpu": 1}),
        (0, [2, 2], {"gpu": 4}),
        (0, [4], {"four-gpus": 1}),
        (0, [8], {"four-gpus": 2}),
    ],
)
def test_the_autoscaler_starts_the_pods_that_the_docs_name(
    job: Record, units: int, groups: list[int], started: dict[str, int]
):
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        _derive_autoscaling_config_from_ray_cr as derive,
    )
    from test_cluster_yaml import machines_to_start

    cluster = {"metadata": {"name": "cbnerf", "namespace": "default"}}
    cluster |= {"spec": job["rayClusterSpec"]}
    assert machines_to_start(derive(cluster), units, groups) == started


def start_command(group: Record, *, address: str | None = None) -> str:
    """`ray start` as KubeRay writes it for the pod of a group; without an address for the head."""
    limits = the_container(group["template"])["resources"]["limits"]
    options = {
        "block": None, "dashboard-agent-listen-port": 52365, "metrics-export-port": 8080,
        "num-cpus": limits["cpu"], "memory": int(limits["memory"].removesuffix("Gi")) << 30,
    }  # fmt: skip
    if gpus := limits.get("nvidia.com/gpu"):
        options["num-gpus"] = gpus
    options |= {"address": address} if address else {"head": None, "dashboard-host": "0.0.0.0"}
    options |= group["rayStartParams"]
    words = [f"--{k}" if v is None else f"--{k}={v}" for k, v in options.items()]
    return f"ulimit -n 65536; ray start {' '.join(words)}"


def submit_command(job: Record, entrypoint: str) -> str:
    """What KubeRay's submitter runs."""
    address, name = f"--address http://{HEAD_SERVICE}:8265", "cbnerf-1"
    return (
        f"until ray job list {address} > /dev/null 2>&1; do sleep 1; done; "
        f"if ! ray job status {address} {name} > /dev/null 2>&1; then "
        f"ray job submit {address} --no-wait --submission-id {name} -- {entrypoint}; fi; "
        f"ray job logs {address} --follow {name}; ray job status {address} {name}"
    )


def in_pod(pod: Record, config: Record, command: str, **variables: str) -> str:
    """A command with the environment of a pod's container, which KubeRay completes."""
    environment = dict(variables)
    container = the_container(pod)
    for _ in container.get("envFrom", []):
        environment |= config["data"]
    environment |= {e["name"]: e["value"] for e in container.get("env", []) if "value" in e}
    words = [shlex.quote(f"{name}={value}") for name, value in environment.items()]
    return f"env {' '.join(words)} bash -c {shlex.quote(command)}"


def start_pod(hosts: Hosts, host: str, command: str) -> None:
    """Run a command in the background of a host, like the container of a pod."""
    started = hosts.ssh(
        HOSTS[host],
        f"mkdir -p /mnt/mlflow && mountpoint -q /mnt/mlflow || mount -t tmpfs tmpfs /mnt/mlflow; "
        f"ln -sfn {ROOT} ~/cbnerf; nohup {command} > /tmp/pod.log 2>&1 < /dev/null &",
    )
    assert started.returncode == 0, started.stderr


@pytest.mark.cluster
def test_a_study_runs_with_the_commands_of_the_pods(
    objects: dict[tuple[str, str], Record], job: Record, tmp_path: Path
):
    smoke = (ROOT / "tune_configs" / "smoke.yaml").read_text(encoding="utf-8")
    config, cluster = objects["ConfigMap", "cbnerf"], job["rayClusterSpec"]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    names = {HEAD_SERVICE: HOSTS["head"], "cbnerf-mlflow": HOSTS["second"]}
    (worker, *_) = cluster["workerGroupSpecs"]
    mlflow = all_pods(objects)["mlflow"]
    serve = the_container(mlflow)
    with started_hosts(tmp_path, names) as hosts:
        start_pod(hosts, "second", in_pod(mlflow, config, serve["args"][0]))
        command = start_command(cluster["headGroupSpec"])
        head = cluster["headGroupSpec"]["template"]
        start_pod(hosts, "head", in_pod(head, config, command, RAY_ADDRESS="127.0.0.1:6379",
                                        RAY_enable_autoscaler_v2="1", **token))  # fmt: skip
        address = f"{HEAD_SERVICE}:6379"
        command = f"until ray health-check --address {address} 2> /dev/null; do sleep 1; done; "
        command += start_command(worker, address=address)
        start_pod(hosts, "first", in_pod(worker["template"], config, command,
                                         RAY_ADDRESS=address, **token))  # fmt: skip
        (hosts.folder / "shared" / "search.yaml").write_text(smoke, encoding="utf-8")
        entrypoint = job["entrypoint"].replace("all", f"arcade --config {SHARED}/search.yaml")
        command = in_pod(job["submitterPodTemplate"], config, submit_command(job, entrypoint),
                         **token)  # fmt: skip
        done = hosts.ssh(HOSTS["second"], command, timeout=400)
        logs = [hosts.ssh(address, "tail -30 /tmp/pod.log").stdout for address in HOSTS.values()]
        assert "succeeded" in done.stdout, "\n".join([done.stdout[-2000:], done.stderr, *logs])
        study = study_in_mlflow("second", "http://127.0.0.1:5000")
        assert study["kinds"] == {"configuration": 2, "scene": 2, "field": 1, "report": 1}
        assert study["statuses"] == ["FINISHED"]
        assert {"first"} == set(study["nodes"]) - {""}
        assert (hosts.folder / "shared" / "studies" / study["name"] / "best.yaml").exists()

"""cluster.yaml and its overlays, held against Ray's own checks, the project and the shell."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from base64 import b64encode
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import yaml

pytestmark = pytest.mark.search
pytest.importorskip("ray")

ROOT = Path(__file__).parents[1]
CLUSTERS = ROOT / "clusters"
OVERLAYS = {"aws": None, "gcp": CLUSTERS / "gcp.yaml", "hosts": CLUSTERS / "hosts.yaml"}
COMMANDS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands",
)  # fmt: skip
SECRETS = r"AKIA|BEGIN [A-Z ]*PRIVATE|(password|secret|token)\w*=\w"
SCRIPTS = sorted(CLUSTERS.glob("*.sh"))


def merged(overlay: Path | None) -> dict[str, Any]:
    """cluster.yaml with the keys of an overlay, by the line that docs/cluster.md gives."""
    if overlay is None:
        return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    page = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^python -c .*cluster\.yaml clusters/.*$", page, re.MULTILINE)
    command = re.sub(r"clusters/\w+\.yaml", str(overlay.relative_to(ROOT)), line)
    command = command.partition(">")[0].replace("python", sys.executable, 1)
    answer = subprocess.run(shlex.split(command), cwd=ROOT, capture_output=True, check=True)
    return yaml.safe_load(answer.stdout)


@pytest.fixture(params=OVERLAYS)
def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    return merged(OVERLAYS[request.param])


def commands(cluster: dict[str, Any]) -> list[str]:
    return [command for kind in COMMANDS for command in cluster.get(kind, [])]


def test_ray_accepts_it(cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    from ray.autoscaler._private.util import prepare_config, validate_config

    if cluster["provider"]["type"] == "gcp":
        cluster["provider"]["project_id"] = "somebodys-project"
    validate_config(prepare_config(cluster))


def test_trainings_never_run_on_the_head_of_a_cloud_and_spot_comes_first():
    for kind in ("aws", "gcp"):
        nodes = merged(OVERLAYS[kind])["available_node_types"]
        assert nodes["head"]["resources"] == {"CPU": 0}
        for kind_of_machine, gpus in (("gpu", 1), ("four_gpus", 4)):
            spot, fallback = (nodes[f"{kind_of_machine}_{x}"] for x in ("spot", "on_demand"))
            assert spot["resources"] == fallback["resources"]
            assert spot["resources"]["GPU"] == gpus
            assert spot["priority"] > fallback["priority"]
            assert spot["min_workers"] == fallback["min_workers"] == 0
            assert "spot" in str(spot["node_config"]).lower()
            assert "spot" not in str(fallback["node_config"]).lower()


ONE, WORKER = {"CPU": 1, "GPU": 0.25}, {"CPU": 1, "GPU": 1}


@pytest.mark.parametrize("kind", ["aws", "gcp"])
@pytest.mark.parametrize(
    ("units", "groups", "started"),
    [
        (1, [], {"gpu_spot": 1}),
        (8, [], {"gpu_spot": 2}),
        (99, [], {"gpu_spot": 8}),
        (0, [2], {"four_gpus_spot": 1}),
        (0, [2, 2], {"four_gpus_spot": 1}),
        (0, [4], {"four_gpus_spot": 1}),
        (0, [4, 4, 4], {"four_gpus_spot": 2, "four_gpus_on_demand": 1}),
        (0, [8], {"four_gpus_spot": 2}),
    ],
)
def test_the_autoscaler_starts_the_machines_that_readme_names(
    kind: str, units: int, groups: list[int], started: dict[str, int]
):
    from ray.autoscaler._private.util import prepare_config

    assert machines_to_start(prepare_config(merged(OVERLAYS[kind])), units, groups) == started


def machines_to_start(cluster: dict[str, Any], units: int, groups: list[int]) -> dict[str, int]:
    """By Ray's own scheduler of machines, for single workers and groups of workers."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import GangResourceRequest

    config = AutoscalingConfig(cluster, skip_content_hash=True)
    make = ResourceRequestUtil.make
    request = SchedulingRequest(
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_worker_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([make(ONE) for _ in range(units)]),
        gang_resource_requests=[
            GangResourceRequest(requests=[make(WORKER)] * workers) for workers in groups
        ],
        disable_launch_config_check=True,
    )
    reply = ResourceDemandScheduler().schedule(request)
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def test_aws_would_understand_its_machines():
    botocore = pytest.importorskip("botocore.session")
    from botocore.validate import ParamValidator

    shape = (
        botocore.Session()
        .get_service_model("ec2", api_version=None)
        .operation_model("RunInstances")
        .input_shape
    )
    for node in merged(None)["available_node_types"].values():
        asked = {"MinCount": 1, "MaxCount": 1, **node["node_config"]}
        report = ParamValidator().validate(asked, shape)
        assert not report.has_errors(), report.generate_report()


def test_commands_and_scripts_are_valid_bash(cluster: dict[str, Any]):
    for text in [*commands(cluster), *(script.read_text(encoding="utf-8") for script in SCRIPTS)]:
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_files_that_commands_name_are_synced(cluster: dict[str, Any]):
    mounts = cluster["file_mounts"]
    assert all(remote == f"~/cbnerf/{local}" for remote, local in mounts.items())
    named = {n for command in commands(cluster) for n in re.findall(r"~/cbnerf/(\S+)\b", command)}
    assert named >= {f"clusters/{script.name}" for script in SCRIPTS}
    assert all((ROOT / name).exists() for name in named)
    assert {name.split("/")[0] for name in named} <= set(mounts.values())


def test_what_machines_install_and_run_is_synced(tmp_path: Path):
    for remote, local in merged(None)["file_mounts"].items():
        source, copy = ROOT / local, tmp_path / remote.removeprefix("~/")
        copy.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    project = tmp_path / "cbnerf"
    metadata = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert all((project / name).exists() for name in [metadata["readme"], "constraints.txt"])
    assert all(list(project.glob(pattern)) for pattern in metadata["license-files"])
    code = "import cbnerf; print(cbnerf.__file__)"
    run = {"cwd": project, "capture_output": True, "check": True, "encoding": "utf-8"}
    environment = {**os.environ, "PYTHONPATH": str(project)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, **run)
    assert done.stdout == f"{project / 'cbnerf' / '__init__.py'}\n"
    subprocess.run([sys.executable, "tune.py", "--help"], env=environment, **run)


def test_nothing_of_another_folder_is_sent(
    cluster: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Ray reads what it is about to send, relative to the folder that it is called in."""
    from ray.autoscaler._private.util import hash_runtime_conf

    (tmp_path / "README.md").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="LICENSE"):
        hash_runtime_conf(cluster["file_mounts"], None, cluster)
    monkeypatch.chdir(ROOT)
    hash_runtime_conf(cluster["file_mounts"], None, cluster)


def test_machines_install_the_versions_that_were_tested(cluster: dict[str, Any]):
    installs = [command for command in commands(cluster) if "pip install" in command]
    assert installs and all("-c constraints.txt" in command for command in installs)


def test_what_is_served_is_served_to_localhost_alone(cluster: dict[str, Any]):
    texts = "\n".join(
        [*commands(cluster), *(script.read_text(encoding="utf-8") for script in SCRIPTS)]
    )
    assert not re.search(r"(?<!\d)0\.0\.0\.0", texts)
    assert "--dashboard-host 127.0.0.1" in texts
    hosts = re.findall(r"--host (\S+)", texts)
    assert hosts == ["127.0.0.1"]


def test_no_file_holds_a_secret():
    for file in [ROOT / "cluster.yaml", *CLUSTERS.iterdir()]:
        for line in file.read_text(encoding="utf-8").splitlines():
            assert not re.search(SECRETS, line, re.I)


def test_the_next_steps_parse():
    from cbnerf.search.request import Options

    text = (CLUSTERS / "next_steps.txt").read_text(encoding="utf-8")
    tyro = pytest.importorskip("tyro")
    (arguments,) = re.findall(r"tune\.py ([^']*)'", text)
    options = tyro.cli(Options, args=arguments.split())
    assert (options.address, options.gpus) == ("auto", 0.25)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home directory as a head has it, around this project and this environment."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "cbnerf").symlink_to(ROOT)
    (home / "venv" / "bin").mkdir(parents=True)
    (home / "venv" / "bin" / "activate").write_text(
        f"PATH={Path(sys.executable).parent}:$PATH\n", encoding="utf-8"
    )
    return home


def in_shell(home: Path, command: str, **variables: str) -> str:
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), **variables}
    answer = subprocess.run(
        ["bash", "-euc", command], env=environment, capture_output=True, text=True, timeout=900
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_settings_point_the_search_at_the_shared_folder(home: Path):
    command = ". ~/cbnerf/clusters/settings.sh; echo $CBNERF_STORAGE $MLFLOW_TRACKING_URI"
    assert in_shell(home, command) == "/mnt/cbnerf http://127.0.0.1:5000\n"
    (home / "cbnerf.secrets").write_text(
        "export MLFLOW_BACKEND_STORE_URI=postgresql://db\n", encoding="utf-8"
    )
    command = ". ~/cbnerf/clusters/settings.sh; echo $MLFLOW_BACKEND_STORE_URI"
    assert in_shell(home, command) == "postgresql://db\n"


def test_a_folder_that_is_already_shared_is_left_alone(home: Path):
    storage = home / "shared"
    in_shell(
        home, "bash ~/cbnerf/clusters/share_folder.sh", CBNERF_NFS="mounted",
        CBNERF_STORAGE=str(storage),
    )  # fmt: skip
    assert storage.is_dir()


AUTHENTICATION = """
[mlflow]
default_permission = READ
database_uri = sqlite:///{folder}/users.db
admin_username = admin
admin_password = {password}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


@pytest.mark.slow
def test_mlflow_asks_for_a_password_where_one_is_set(home: Path, tmp_path: Path):
    import psutil

    password, address = "long-enough-for-mlflow", "http://127.0.0.1:5000"
    text = AUTHENTICATION.format(folder=tmp_path, password=password)
    (home / "mlflow_auth.ini").write_text(text, encoding="utf-8")
    start = ". ~/venv/bin/activate; bash ~/cbnerf/clusters/start_mlflow.sh"
    search = Request(
        f"{address}/api/2.0/mlflow/experiments/search", b'{"max_results": 1}',
        {"Content-Type": "application/json"},
    )  # fmt: skip
    try:
        in_shell(home, start, CBNERF_STORAGE=str(tmp_path))
        with pytest.raises(HTTPError, match="401"):
            urlopen(search)
        login = b64encode(f"admin:{password}".encode()).decode()
        search.add_header("Authorization", f"Basic {login}")
        assert urlopen(search).status == 200
        assert password not in (tmp_path / "mlflow.log").read_text(encoding="utf-8")
    finally:
        for process in psutil.process_iter(["cmdline"]):
            if str(tmp_path) in " ".join(process.info["cmdline"] or []):
                for each in (*process.children(recursive=True), process):
                    each.kill()

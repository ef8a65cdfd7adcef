"""`ray up` for real: three hosts made of network namespaces, a study on them, `ray down`.

Each host has its own network, process, mount, host-name and IPC namespace with an sshd, and a
private /tmp and /dev/shm; they share a folder, as machines of a cluster share theirs.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SHARED = Path("/mnt/cbnerf")
PRIVATE = Path("/mnt/cbnerf-tmp")  # where a host's own /tmp is put together
BRIDGE, NETWORK = "cbnerf0", "10.99.0"
HOSTS = {"head": f"{NETWORK}.11", "first": f"{NETWORK}.12", "second": f"{NETWORK}.13"}
SSHD = """
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
SetEnv PATH={path}
Subsystem sftp internal-sftp
"""


ALL_JOINED = """
import ray, time
ray.init("auto", log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < 3: time.sleep(1)
"""


def _missing() -> str | None:
    if os.name != "posix" or os.geteuid() != 0:
        return "needs root"
    absent = [tool for tool in ("ip", "unshare", "ssh", "sshd", "rsync") if not _which(tool)]
    if absent:
        return f"needs {', '.join(absent)}"
    tried = subprocess.run(["ip", "link", "add", BRIDGE, "type", "bridge"], capture_output=True)
    if tried.returncode:
        return f"no network namespaces here: {tried.stderr.decode().strip()}"
    subprocess.run(["ip", "link", "del", BRIDGE], check=True)
    return None


def _which(tool: str) -> str | None:
    return shutil.which(tool) or shutil.which(tool, path="/usr/sbin:/sbin")


def run(*command: str | Path, **options: Any) -> str:
    """Standard output of a command; what it said where it fails."""
    answer = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=900, **options
    )
    assert answer.returncode == 0, f"{command}\n{answer.stdout[-3000:]}\n{answer.stderr[-3000:]}"
    return answer.stdout


@dataclass
class Hosts:
    """Three machines on one wire."""

    folder: Path
    servers: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def start(self) -> None:
        for name in ("key", "host_key"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name)
        Path("/run/sshd").mkdir(exist_ok=True)
        for place in (SHARED, PRIVATE):
            place.mkdir(exist_ok=True)
        (self.folder / "shared").mkdir()
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "address", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        for name, address in HOSTS.items():
            self._plug(name, address)
            self._boot(name, address)
        self._wait()

    def _plug(self, name: str, address: str) -> None:
        inside = ["ip", "-n", f"cbnerf-{name}"]
        run("ip", "netns", "add", f"cbnerf-{name}")
        run("ip", "link", "add", f"cb-{name}", "type", "veth", "peer", "eth0",
            "netns", f"cbnerf-{name}")  # fmt: skip
        run("ip", "link", "set", f"cb-{name}", "master", BRIDGE, "up")
        run(*inside, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            run(*inside, "link", "set", device, "up")
        run(*inside, "route", "add", "default", "via", f"{NETWORK}.1")

    def _boot(self, name: str, address: str) -> None:
        config = self.folder / f"sshd-{name}"
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        config.write_text(
            SSHD.format(address=address, folder=self.folder, path=path), encoding="utf-8"
        )
        # Each host has a /tmp of its own, put together aside, with what it needs of ours in it.
        needed = [
            place.relative_to("/tmp")
            for place in (ROOT, Path(sys.prefix), self.folder)
            if place.is_relative_to("/tmp")
        ]
        binds = "".join(
            f"mkdir -p {PRIVATE / place} && mount --bind {'/tmp' / place} {PRIVATE / place} && "
            for place in needed
        )
        script = (
            f"hostname {name} && mount --bind {self.folder / 'shared'} {SHARED} && "
            f"mount -t tmpfs -o size=4g tmpfs {PRIVATE} && mkdir {PRIVATE}/home && {binds}"
            f"mount --move {PRIVATE} /tmp && mount -t tmpfs -o size=2g tmpfs /dev/shm && "
            # A home of its own: ssh asks the password file for it, not the environment.
            "sed 's|^root:.*|root:x:0:0:root:/tmp/home:/bin/bash|' /etc/passwd > /tmp/passwd && "
            "mount --bind /tmp/passwd /etc/passwd && "
            f"exec {_which('sshd')} -D -e -f {config}"
        )
        with (self.folder / f"{name}.log").open("wb") as log:
            self.servers.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", f"cbnerf-{name}", "unshare", "--pid", "--mount",
                     "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc",
                     "bash", "-ec", script],
                    stdout=log, stderr=log, start_new_session=True,
                )
            )  # fmt: skip

    def _wait(self) -> None:
        for address in HOSTS.values():
            for _ in range(50):
                if self.ssh(address, "true").returncode == 0:
                    break
                time.sleep(0.2)
            else:
                logs = "".join(log.read_text(encoding="utf-8") for log in self.folder.glob("*.log"))
                pytest.fail(f"{address} does not answer: {logs}")

    def ssh(self, address: str, command: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["ssh", "-i", str(self.folder / "key"), "-o", "StrictHostKeyChecking=no",
             "-o", "UserKnownHostsFile=/dev/null", "-o", "ConnectTimeout=2",
             f"root@{address}", command],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def stop(self) -> None:
        for server in self.servers:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(timeout=20)
        for name in HOSTS:  # A namespace whose last socket lingers would keep its wire.
            subprocess.run(["ip", "link", "del", f"cb-{name}"], check=False)
            subprocess.run(["ip", "netns", "del", f"cbnerf-{name}"], check=False)
        subprocess.run(["ip", "link", "del", BRIDGE], check=False)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    if reason := _missing():
        pytest.skip(reason)
    hosts = Hosts(tmp_path)
    try:
        hosts.start()
        yield hosts
    finally:
        hosts.stop()


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
        study = json.loads(_study(hosts))
    finally:
        run(ray, "down", "-y", cluster, env=environment)
    assert study["kinds"] == {"configuration": 3, "scene": 6, "field": 2, "report": 1}
    assert study["statuses"] == ["FINISHED"]
    assert {"first", "second"} <= set(study["nodes"])
    assert (hosts.folder / "shared" / "studies" / study["name"] / "best.yaml").exists()


def _study(hosts: Hosts) -> str:
    """What MLflow's server on the head knows of the study."""
    script = """
import collections, json, mlflow
client = mlflow.MlflowClient("http://127.0.0.1:5000")
(study,) = [e for e in client.search_experiments() if e.name != "Default"]
runs = client.search_runs([study.experiment_id])
print(json.dumps({
    "name": study.name,
    "kinds": collections.Counter(run.data.tags["cbnerf.kind"] for run in runs),
    "statuses": sorted({run.info.status for run in runs}),
    "nodes": sorted({run.data.tags.get("cbnerf.node", "") for run in runs}),
}))
"""
    return run("ip", "netns", "exec", "cbnerf-head", sys.executable, "-c", script)

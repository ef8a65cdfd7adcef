"""Three hosts made of network namespaces, as machines of a cluster.

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SHARED = Path("/mnt/cbnerf")
PRIVATE = Path("/mnt/cbnerf-tmp")
"""Where a host's own /tmp is put together."""
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
"""Processes of pytest-xdist have hosts of their own."""
BRIDGE, NETWORK = f"cbnerf{WORKER}", f"10.99.{WORKER}"
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


def missing() -> str | None:
    """What keeps this machine from making hosts."""
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


def namespace(name: str) -> str:
    return f"{BRIDGE}-{name}"


def _wire(name: str) -> str:
    """The near end; the kernel allows 15 letters."""
    return f"cb{WORKER}-{name}"


@dataclass
class Hosts:
    """Three machines on one wire."""

    folder: Path
    names: Mapping[str, str] = field(default_factory=dict)
    """Addresses by further names, such as those of services."""
    servers: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def start(self) -> None:
        for name in ("key", "host_key"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name)
        Path("/run/sshd").mkdir(exist_ok=True)
        for place in (SHARED, PRIVATE):
            place.mkdir(exist_ok=True)
        (self.folder / "shared").mkdir()
        lines = [f"{address} {name}\n" for name, address in {**HOSTS, **self.names}.items()]
        names = "127.0.0.1 localhost\n" + "".join(lines)
        (self.folder / "hosts").write_text(names, encoding="utf-8")
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "address", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        for name, address in HOSTS.items():
            self._plug(name, address)
            self._boot(name, address)
        self._wait()

    def _plug(self, name: str, address: str) -> None:
        inside = ["ip", "-n", namespace(name)]
        run("ip", "netns", "add", namespace(name))
        run("ip", "link", "add", _wire(name), "type", "veth", "peer", "eth0",
            "netns", namespace(name))  # fmt: skip
        run("ip", "link", "set", _wire(name), "master", BRIDGE, "up")
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
            # No name server: gRPC would ask it for IPv6 addresses, and wait.
            f"mount --bind {self.folder / 'hosts'} /etc/hosts && "
            "mount --bind /dev/null /etc/resolv.conf && "
            f"exec {_which('sshd')} -D -e -f {config}"
        )
        with (self.folder / f"{name}.log").open("wb") as log:
            self.servers.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", namespace(name), "unshare", "--pid", "--mount",
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

    def ssh(
        self, address: str, command: str, timeout: float = 60
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["ssh", "-i", str(self.folder / "key"), "-o", "StrictHostKeyChecking=no",
             "-o", "UserKnownHostsFile=/dev/null", "-o", "ConnectTimeout=2",
             f"root@{address}", command],
            capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip

    def stop(self) -> None:
        for server in self.servers:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(timeout=20)
        for name in HOSTS:  # A namespace whose last socket lingers would keep its wire.
            subprocess.run(["ip", "link", "del", _wire(name)], check=False)
            subprocess.run(["ip", "netns", "del", namespace(name)], check=False)
        subprocess.run(["ip", "link", "del", BRIDGE], check=False)


@contextmanager
def started_hosts(folder: Path, names: Mapping[str, str] | None = None) -> Iterator[Hosts]:
    """Hosts for the length of a block; skips the test where this machine cannot make them."""
    if reason := missing():
        pytest.skip(reason)
    hosts = Hosts(folder, names or {})
    try:
        hosts.start()
        yield hosts
    finally:
        hosts.stop()


def study_in_mlflow(host: str, address: str) -> dict[str, Any]:
    """What MLflow's server knows of its only study, asked from a host."""
    script = f"""
import collections, json, mlflow
client = mlflow.MlflowClient("{address}")
(study,) = [e for e in client.search_experiments() if e.name != "Default"]
runs = client.search_runs([study.experiment_id])
print(json.dumps({{
    "name": study.name,
    "kinds": collections.Counter(run.data.tags["cbnerf.kind"] for run in runs),
    "statuses": sorted({{run.info.status for run in runs}}),
    "nodes": sorted({{run.data.tags.get("cbnerf.node", "") for run in runs}}),
}}))
"""
    command = ["ip", "netns", "exec", namespace(host), sys.executable, "-c", script]
    return json.loads(run(*command))

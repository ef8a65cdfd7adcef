"""MLflow's server in processes of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from drivers import PATIENCE


def free_address() -> str:
    """An address of this machine at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def serve_mlflow(store: str, folder: Path, address: str) -> "subprocess.Popen[bytes]":
    """MLflow's server on a store, once it answers; its log and artifacts are in the folder."""
    command = [
        sys.executable, "-m", "mlflow", "server", "--workers", "1",
        "--host", "127.0.0.1", "--port", address.rpartition(":")[2],
        "--backend-store-uri", store,
        "--artifacts-destination", str(folder / "mlartifacts"),
    ]  # fmt: skip
    with (folder / "mlflow.log").open("ab") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )  # fmt: skip
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2).close()
            return server
        except OSError:
            time.sleep(0.2)
    pytest.fail((folder / "mlflow.log").read_text(encoding="utf-8")[-3000:])


def stop(server: "subprocess.Popen[bytes]") -> None:
    """Kill a server with the processes that serve for it."""
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()

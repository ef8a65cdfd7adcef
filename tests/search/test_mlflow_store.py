"""Where MLflow keeps runs: real SQLite files, a real https server, names of any kind."""

import os
import re
import shutil
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.utils.validation import (
    _validate_metric_name,
    _validate_param_name,
    _validate_tag_name,
)
from sqlalchemy import make_url

from cbnerf.search.comparison import check_mlflow
from cbnerf.search.mlflow_store import legal_key, open_client, open_experiment, tracking_uri

pytestmark = [
    pytest.mark.search,
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),  # MLflow's
]

OPEN = (
    "import sys, pathlib; from cbnerf.search.mlflow_store import open_client; "
    "print(len(open_client(pathlib.Path(sys.argv[1])).search_experiments()))"
)


def test_concurrent_and_killed_processes_leave_a_complete_database(tmp_path: Path):
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
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert make_url(tracking_uri(storage)).database == str(storage / "mlflow.db")
    assert {"mlflow.db", "mlartifacts"} <= {path.name for path in storage.iterdir()}


def test_a_storage_that_moves_takes_its_artifacts_along(tmp_path: Path, empty_store: Path):
    old, new = tmp_path / "old", tmp_path / "new place"
    old.mkdir()
    shutil.copy(empty_store, old / "mlflow.db")
    client = open_client(old)
    first = client.create_run(open_experiment(client, "küche", old, {})).info.run_id
    client.log_text(first, "before", "first.txt")
    renamed = client.create_run(open_experiment(client, "first name", old, {})).info.run_id
    client.log_text(renamed, "before", "renamed.txt")
    client.rename_experiment(client.get_run(renamed).info.experiment_id, "second name")
    elsewhere = client.create_experiment("elsewhere", artifact_location="file:///not/ours")
    old.rename(new)
    client = open_client(new)
    experiment = open_experiment(client, "küche", new, {})
    second = client.create_run(experiment).info.run_id
    client.log_text(second, "after", "second.txt")
    files = ((first, "first.txt"), (second, "second.txt"), (renamed, "renamed.txt"))
    for run, file in files:
        assert [found.path for found in client.list_artifacts(run)] == [file]
        assert Path(client.download_artifacts(run, file)).is_file()
    assert not old.exists()
    assert {location(client, run) for run in (first, second)} == {
        (new / "mlartifacts" / "küche").as_uri()
    }
    assert client.get_experiment(elsewhere).artifact_location == "file:///not/ours"


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


@pytest.mark.parametrize("name", ["fern", "my scene-2_b.v1", "cb-nerf stage 1"])
def test_legal_names_stay_as_they_are(name: str):
    assert legal_key(name) == name


@pytest.mark.parametrize("name", ["val", "test", "train", "mean"])
def test_no_scene_takes_the_keys_of_means(name: str):
    assert re.fullmatch(rf"{name}-[0-9a-f]{{8}}", legal_key(name))


@settings(derandomize=True, max_examples=25, deadline=None)
@given(name=st.text(min_size=1))
def test_mlflow_keeps_metrics_and_images_of_any_name(name: str, run_of_any: tuple[Any, str]):
    client, run = run_of_any
    key = legal_key(name)
    client.log_metric(run, f"{key}/psnr", 20.0)
    client.log_image(run, np.zeros((2, 2, 3), np.uint8), key=f"{key}/strip", step=0)
    assert client.get_run(run).data.metrics[f"{key}/psnr"] == 20.0
    images = [file.path for file in client.list_artifacts(run, "images")]
    assert any(path.startswith(f"images/{key}~strip+") for path in images)


@pytest.fixture(scope="module")
def run_of_any(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    storage = tmp_path_factory.mktemp("any")
    shutil.copy(empty_store, storage / "mlflow.db")
    client = open_client(storage)
    return client, client.create_run(open_experiment(client, "any", storage, {})).info.run_id


def make_foreign(file: Path) -> None:
    with closing(sqlite3.connect(file)) as database:
        database.execute("CREATE TABLE birds (name TEXT)")


def make_newer(file: Path) -> None:
    """What a later version of MLflow would leave."""
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")


@pytest.mark.parametrize(
    "spoil, what",
    [
        (lambda file: file.write_bytes(b"not a database" * 1000), "file is not a database"),
        (lambda file: os.truncate(file, 20_000), "malformed|disk I/O"),
        (lambda file: (file.unlink(), make_foreign(file)), "no such table"),
        (lambda file: (file.unlink(), file.mkdir()), "unable to open"),
        (make_newer, "out-of-date.*mlflow db upgrade 'sqlite:"),
    ],
    ids=["damaged", "cut", "foreign", "folder", "newer"],
)
@pytest.mark.parametrize("is_named", [False, True])
def test_a_database_of_another_kind_is_named_at_once_and_left_as_it_is(
    spoil: Callable[[Path], Any], what: str, is_named: bool, tmp_path: Path, empty_store: Path,
    monkeypatch,
):  # fmt: skip
    file = tmp_path / "mlflow.db"
    shutil.copy(empty_store, file)
    spoil(file)
    if is_named:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
    before = file.read_bytes() if file.is_file() else b""
    for opens in (open_client, check_mlflow):
        with pytest.raises(ValueError, match=f"{re.escape(str(file))}: .*({what})") as refusal:
            opens(tmp_path)
        assert "\n" not in str(refusal.value)
    assert not file.is_file() or file.read_bytes() == before


def test_an_empty_file_becomes_a_database(tmp_path: Path):
    (tmp_path / "mlflow.db").touch()
    assert len(open_client(tmp_path).search_experiments()) == 1


@pytest.mark.parametrize(
    "uri, what",
    [
        ("postgresql+psycopg2://me:secret@127.0.0.1:9/runs", "'psycopg2-binary'"),
        ("mysql://me:secret@127.0.0.1:9/runs", "'mysqlclient'"),
        ("postgresql+typo://me:secret@127.0.0.1:9/runs", "plugin"),
        ("gopher://me:secret@127.0.0.1:9/runs", "gopher"),
    ],
)
def test_a_database_that_cannot_be_spoken_to_is_named(
    uri: str, what: str, tmp_path: Path, monkeypatch
):
    if "pip" in what and find_spec(uri.split(":")[0].split("+")[-1]):
        pytest.skip("its driver is installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ValueError, match=f"MLFLOW_TRACKING_URI: .*{what}") as refusal:
        open_client(tmp_path)
    assert "secret" not in str(refusal.value) and "\n" not in str(refusal.value)


class _Searches(BaseHTTPRequestHandler):
    """Answers as a tracking server without experiments does, for those who know its password."""

    def do_POST(self) -> None:
        is_known = self.headers["Authorization"] == f"Basic {b64encode(b'me:secret').decode()}"
        body = b'{"experiments": []}' if is_known else b"You are not authenticated"
        self.send_response(200 if is_known else 401)
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
def test_a_server_with_its_own_certificate_is_trusted_if_mlflow_is_configured_to(
    own_certificate: tuple[str, Path], tmp_path: Path, monkeypatch
):
    address, certificate = own_certificate
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(ValueError, match=f"{address}: its certificate is not trusted"):
        open_client(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificate))
    with pytest.raises(ValueError, match=f"{address}: .*401.*not authenticated"):
        open_client(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    assert open_client(tmp_path).search_experiments() == []


def test_a_server_that_does_not_answer_is_named_at_once(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:9: no server answers") as refusal:
        open_client(tmp_path)
    assert "secret" not in str(refusal.value)
    assert not list(tmp_path.iterdir())

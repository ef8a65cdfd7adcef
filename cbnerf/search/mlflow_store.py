"""The MLflow store: at MLFLOW_TRACKING_URI, else *embedded* in the storage.

An embedded store is a SQLite file and a folder of artifacts; it can be moved with the storage.
"""

import hashlib
import os
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit, urlunsplit

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy import create_engine, inspect, make_url, text
from sqlalchemy.exc import SQLAlchemyError

from cbnerf.files import atomic_write

_VARIABLE = "MLFLOW_TRACKING_URI"
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_PACKAGES = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
"""Names on PyPI of database drivers whose module has another name."""
_ARTIFACTS = "mlartifacts"


def tracking_uri(storage: Path) -> str:
    """MLFLOW_TRACKING_URI if it is set, else a SQLite file in the storage."""
    return os.environ.get(_VARIABLE) or _embedded_uri(storage)


def _database_file(storage: Path) -> Path:
    return storage / "mlflow.db"


def _sqlite_uri(file: Path) -> str:
    # MLflow creates the parent folder of a path after `sqlite:///` without unquoting the path as
    # SQLAlchemy does; it does not for a URI with a driver. `URL.create` quotes more than necessary.
    quoted = str(file).replace("%", "%25").replace("?", "%3F")
    return f"{'sqlite' if quoted == str(file) else 'sqlite+pysqlite'}:///{quoted}"


def _embedded_uri(storage: Path) -> str:
    return _sqlite_uri(_database_file(storage))


def open_client(storage: Path) -> MlflowClient:
    """A client of the MLflow at `tracking_uri`; raises ValueError if that does not answer."""
    uri = tracking_uri(storage)
    is_embedded = uri == _embedded_uri(storage)
    store = str(_database_file(storage)) if is_embedded else f"{_VARIABLE}: {without_password(uri)}"
    try:
        if is_embedded:
            storage.mkdir(parents=True, exist_ok=True)
            with FileLock(storage / "mlflow.lock"):
                _make_database(storage)
                _check_database(uri)
                _relocate_artifacts(storage)
        elif urlsplit(uri).scheme.split("+")[0] in _DATABASES:
            _check_database(uri)
        client = MlflowClient(uri)
        with _failing_fast():
            client.search_experiments(max_results=1)
    except ModuleNotFoundError as error:
        package = _PACKAGES.get(error.name or "", error.name)
        raise ValueError(f"{store} needs a driver; pip install '{package}'") from None
    except (MlflowException, SQLAlchemyError) as error:
        raise ValueError(f"{store}: {_describe(error, uri)}") from None
    return client


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn errors of MLflow into a ValueError with one line."""
    try:
        yield
    except MlflowException as error:
        raise ValueError(f"MLflow: {first_line(error)}") from None


def runs_page(experiment_id: str, quality: str) -> str:
    """The address, relative to the server, of the charts of a study's configurations, sorted by a
    quality."""
    query = {
        "compareRunsMode": "CHART",
        "workflowType": "machine_learning",  # else it opens on pages for language models
        "orderByKey": f"metrics.`{quality}`",
        "orderByAsc": "false",
        "searchFilter": "tags.`cbnerf.kind` = 'configuration'",
    }
    return f"#/experiments/{experiment_id}/runs?{urlencode(query, quote_via=quote, safe='')}"


def without_password(uri: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _describe(error: MlflowException | SQLAlchemyError, uri: str) -> str:
    """The problem of a server or a database, and what to do about it."""
    root: BaseException = error
    while (cause := root.__cause__ or root.__context__) is not None:
        root = cause
    if isinstance(root, ssl.SSLError):
        return (
            f"its certificate is not trusted ({first_line(root)}); name the file of its "
            "authority in MLFLOW_TRACKING_SERVER_CERT_PATH"
        )
    if isinstance(error, MlflowException) and root is error:  # the server has answered
        return first_line(error).replace("<database_uri>", f"'{without_password(uri)}'")
    if uri.startswith("http"):
        return (
            f"no server answers ({first_line(root)}); start it, or unset the variable to keep "
            "the runs in the storage"
        )
    return (
        f"cannot be used as MLflow's database ({first_line(root)}); move the file away if it is "
        "damaged or no such database: a new one is created"
    )


def first_line(error: BaseException) -> str:
    """The first line of an error, without passwords; SQLAlchemy adds its statements below."""
    line = str(error).strip().partition("\n")[0]
    return re.sub(r"//[^/@\s]*@", "//", line)[:300]


@contextmanager
def _failing_fast() -> Iterator[None]:
    """Let MLflow's client fail after one attempt of 20 s instead of minutes of silent retries."""
    limits = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
    before = {name: os.environ.get(name) for name in limits}
    os.environ.update(limits)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _check_database(uri: str) -> None:
    """Raise SQLAlchemyError at once where MLflow would retry silently for minutes."""
    url = make_url(uri)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
        return  # MLflow creates it.
    engine = create_engine(url)
    try:
        inspect(engine).get_table_names()
    finally:
        engine.dispose()


def _make_database(storage: Path) -> None:
    """Create the database atomically: MLflow does it in many steps and cannot complete a partial
    one. The caller holds a lock."""
    file = _database_file(storage)
    if not file.exists() or file.stat().st_size == 0:  # a full disk leaves an empty one
        for leftover in storage.glob(f".{file.name}.*"):  # of a killed process
            leftover.unlink()
        with atomic_write(file) as unfinished:
            MlflowClient(_sqlite_uri(unfinished)).search_experiments()


def _relocate_artifacts(storage: Path) -> None:
    """Point experiments and runs to the artifacts of this storage after it was moved or copied.

    MLflow stores absolute locations and has no API to change them.
    """
    engine = create_engine(_embedded_uri(storage))
    try:
        with engine.begin() as database:
            rows = database.execute(
                text("SELECT experiment_id, artifact_location FROM experiments")
            )
            for number, before in rows.all():
                # The last folder, since the experiment may have been renamed.
                parent, _, folder = (before or "").rpartition("/")
                now = f"{(storage / _ARTIFACTS).as_uri()}/{folder}"
                is_ours = parent.startswith("file:") and parent.endswith(f"/{_ARTIFACTS}")
                if is_ours and before != now:
                    about = {"id": number, "now": now, "before": before, "length": len(before)}
                    for update in _UPDATES_OF_LOCATIONS:
                        database.execute(text(update), about)
    finally:
        engine.dispose()


_UPDATES_OF_LOCATIONS = (
    "UPDATE experiments SET artifact_location = :now WHERE experiment_id = :id",
    "UPDATE runs SET artifact_uri = :now || substr(artifact_uri, :length + 1) "
    "WHERE experiment_id = :id AND substr(artifact_uri, 1, :length) = :before",
)


def open_experiment(client: MlflowClient, name: str, storage: Path, tags: dict[str, str]) -> str:
    """The id of an experiment, which is created, or restored if it was deleted."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return found.experiment_id
    is_embedded = client.tracking_uri == _embedded_uri(storage)
    artifacts = (storage / _ARTIFACTS / name).as_uri() if is_embedded else None
    return client.create_experiment(name, artifact_location=artifacts, tags=tags)


_ILLEGAL = re.compile(r"[^A-Za-z0-9_. -]")
_TAKEN = ("train", "val", "test", "mean")
"""Prefixes of other keys; a scene with such a name would collide with them."""
_MAX_NAME = 80


def legal_key(name: str) -> str:
    """The name of a scene or a row as a part of MLflow's keys, which allow few characters.

    Legal names are unchanged. In others each illegal character becomes `_`, and a hash is appended
    so that different names have different keys: `garden(1)` gives `garden_1_-46f1693b`.
    """
    legal = _ILLEGAL.sub("_", name)[:_MAX_NAME].strip(". ")
    if legal == name and name not in _TAKEN:
        return name
    return f"{legal}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"

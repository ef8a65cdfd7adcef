"""The store of trained stages: a folder for each fingerprint, complete once it has a manifest.

The fingerprint of a stage hashes what changes its numbers: knobs, photographs and cameras, the
precision really used, and the code of the stage without comments and docstrings. Each is trained
once: concurrent requests block on a lock, which the operating system releases when its process
dies. `manifest.json` is written last, with the size and hash of every file. A folder without it is
unfinished and is resumed; an entry whose files do not match it is broken and is retrained.

Behind the folder there may be a remote store that several clusters share, such as
`s3://bucket/cache`.
"""

import ast
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from filelock import FileLock, Timeout

import cbnerf
from cbnerf.config import Config, flatten, flatten_field
from cbnerf.data.scene import Scene
from cbnerf.files import atomic_write_text
from cbnerf.nerf.model import Precision
from cbnerf.training.checkpoint import CHECKPOINT_FILES, Stage, load_checkpoint

MANIFEST = "manifest.json"
_LOCKS = ".locks"

FIELD_CODE = (
    "downsampling.py",
    "kernels.py",
    "rng.py",
    "metrics.py",
    "nerf/depths.py",
    "nerf/fields.py",
    "nerf/planes.py",
    "nerf/plane_kernels.py",
    "nerf/model.py",
    "nerf/rays.py",
    "nerf/rendering.py",
    "nerf/sampling.py",
    "nerf/warp.py",
    "data/pixels.py",
    "data/renders.py",
    "data/scene.py",
    "data/splits.py",
    "training/depths.py",
    "training/distributed.py",
    "training/evaluation.py",
    "training/field.py",
    "training/loop.py",
)
"""Files of the package that can change the numbers of stage 1. The values of its knobs are hashed,
so `config.py` is not among them."""
REFINER_CODE = (
    "config.py",
    "codebook",
    "baselines",
    "data/patches.py",
    "data/references.py",
    "training/models.py",
    "training/refiner.py",
)
"""Files and folders that can change the numbers of stage 2 beside those of stage 1."""


def field_fingerprint(config: Config, scene: Scene) -> str:
    """Hash of photographs, cameras, the knobs of stage 1 and its code.

    ValueError for `field.precision: auto`, which differs between machines: see `settle_precision`.
    """
    if config.field.precision == "auto":
        raise ValueError("a fingerprint of stage 1 needs the precision really used, not `auto`")
    digest = hashlib.sha256()
    digest.update(scene.images.numpy().tobytes())
    digest.update(scene.camera_to_world.numpy().tobytes())
    intrinsics = scene.intrinsics.tolist()
    digest.update(
        json.dumps([intrinsics, scene.scale, flatten_field(config)], sort_keys=True).encode()
    )
    digest.update(_hash_code(FIELD_CODE).encode())
    return digest.hexdigest()[:16]


def refiner_fingerprint(config: Config, fields: Sequence[str]) -> str:
    """Hash of all knobs, the code of both stages, and the fingerprints of the `fields` whose
    renders the refiner serves or is trained on, in order."""
    content = json.dumps([fields, flatten(config), _hash_code(REFINER_CODE)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@cache
def _hash_code(parts: tuple[str, ...], package: Path = Path(cbnerf.__file__).parent) -> str:
    digest = hashlib.sha256()
    for part in parts:
        path = package / part
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            digest.update(_strip_prose(file.read_text(encoding="utf-8")).encode())
    return digest.hexdigest()


def _strip_prose(source: str) -> str:
    """Source code without comments, docstrings and layout.

    `ast.unparse` changes less between versions of Python than `ast.dump`; two minor versions that
    write some expression differently still do not share entries.
    """
    return ast.unparse(_WithoutStrings().visit(ast.parse(source)))


class _WithoutStrings(ast.NodeTransformer):
    """Drops statements that are a string alone: docstrings, also those under assignments."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if text else node


def write_manifest(folder: Path, precision: Precision) -> None:
    """Mark a folder as complete: the size and SHA-256 of its files, and the precision in which its
    stage was trained."""
    visible = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    files = [file for file in visible if file.name != MANIFEST and file.is_file()]
    hashed = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files}
    content = {"precision": precision, "files": hashed}
    atomic_write_text(folder / MANIFEST, json.dumps(content, indent=1))


def is_complete(folder: Path, *, hashed: bool = False) -> bool:
    """Whether a folder has a manifest and files of these sizes; `hashed` reads every byte."""
    try:
        files = _read_files(folder)
        return bool(files) and all(
            (folder / name).stat().st_size == about["bytes"]
            and (not hashed or _sha256(folder / name) == about["sha256"])
            for name, about in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # files are missing, or the manifest itself is damaged


def _read_files(folder: Path) -> dict[str, dict[str, Any]]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


State = Literal["whole", "unfinished", "in use", "broken"]


class Entry(NamedTuple):
    """An entry as `cbnerf cache list` shows it."""

    folder: Path
    state: State
    num_bytes: int
    last_used: float
    """Seconds since 1970."""


@dataclass(frozen=True)
class Store:
    """The entries below a folder; local or on a file system that all machines share."""

    folder: Path
    remote: str | None = None
    """URI of pyarrow's file systems, which entries are fetched from and sent to."""

    def path(self, stage: Stage, scene: str, fingerprint: str) -> Path:
        """The folder of an entry, there or not."""
        return self.folder / f"{stage}-{scene}-{fingerprint}"

    def complete(self, entry: Path, train: Callable[[Path], object]) -> Path:
        """Return the entry once it is whole: found, fetched, or trained by `train(entry)`, which
        must end with `write_manifest`. Concurrent requests wait for the one that trains."""
        self._touch(entry)
        if not _is_intact(entry):
            with self._lock(entry):
                if not _is_intact(entry):
                    self._make(entry, train)
        return entry

    def entries(self, *, thorough: bool = False) -> Iterator[Entry]:
        """All entries, by name; `thorough` reads every byte to find broken ones."""
        for folder in sorted(self.folder.glob("*-*-*")):
            files = [file for file in folder.rglob("*") if file.is_file()]
            lock = self._lock_file(folder)
            yield Entry(
                folder,
                self._state(folder, thorough),
                sum(file.stat().st_size for file in files),
                lock.stat().st_mtime if lock.exists() else folder.stat().st_mtime,
            )

    def remove(self, entry: Path) -> bool:
        """Delete an entry; False if a process is training it."""
        try:
            with self._lock(entry, timeout=0.0):
                shutil.rmtree(entry)
        except Timeout:
            return False
        return True

    def prune(self, *, idle_days: float, max_bytes: float) -> list[Entry]:
        """Remove broken entries, those not used for `idle_days`, then the least recently used ones
        until at most `max_bytes` are left; returns what was removed."""
        entries = sorted(self.entries(thorough=True), key=lambda entry: entry.last_used)
        oldest = time.time() - idle_days * 86_400
        total = sum(entry.num_bytes for entry in entries)
        removed = []
        for entry in entries:
            unwanted = entry.state == "broken" or entry.last_used < oldest or total > max_bytes
            if unwanted and self.remove(entry.folder):
                removed.append(entry)
                total -= entry.num_bytes
        return removed

    def _make(self, entry: Path, train: Callable[[Path], object]) -> None:
        if (entry / MANIFEST).exists() or not _can_resume(entry):
            shutil.rmtree(entry)
        if not entry.exists() and self._fetch(entry):
            return
        for left in entry.glob(".*"):  # by an atomic write that was killed
            left.unlink()
        train(entry)
        self._send(entry)

    def _state(self, entry: Path, thorough: bool) -> State:
        if not (entry / MANIFEST).exists():
            return "in use" if self._is_locked(entry) else "unfinished"
        return "whole" if is_complete(entry, hashed=thorough) else "broken"

    def _lock_file(self, entry: Path) -> Path:
        return self.folder / _LOCKS / f"{entry.name}.lock"

    def _lock(self, entry: Path, timeout: float = -1.0) -> FileLock:
        self._lock_file(entry).parent.mkdir(parents=True, exist_ok=True)
        return FileLock(self._lock_file(entry), timeout=timeout)

    def _is_locked(self, entry: Path) -> bool:
        try:
            with self._lock(entry, timeout=0.0):
                return False
        except Timeout:
            return True

    def _touch(self, entry: Path) -> None:
        """Record the use of an entry as the time of its lock file."""
        file = self._lock_file(entry)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()

    def _fetch(self, entry: Path) -> bool:
        """Copy a whole entry from the remote store, if it has one."""
        if self.remote is None:
            return False
        from pyarrow import fs  # comes with Ray; needed for a remote store only

        remote, root = fs.FileSystem.from_uri(self.remote)
        source = f"{root}/{entry.name}"
        if remote.get_file_info(f"{source}/{MANIFEST}").type == fs.FileType.NotFound:
            return False
        arriving = entry.with_name(f".{entry.name}.{uuid.uuid4().hex}")
        try:
            arriving.mkdir(parents=True)
            fs.copy_files(source, str(arriving), remote, fs.LocalFileSystem())
            if not is_complete(arriving, hashed=True):
                return False
            os.replace(arriving, entry)
        finally:
            shutil.rmtree(arriving, ignore_errors=True)
        return True

    def _send(self, entry: Path) -> None:
        """Copy a whole entry to the remote store, its manifest last."""
        if self.remote is None:
            return
        from pyarrow import fs

        remote, root = fs.FileSystem.from_uri(self.remote)
        target, local = f"{root}/{entry.name}", fs.LocalFileSystem()
        remote.create_dir(target, recursive=True)
        for name in [*_read_files(entry), MANIFEST]:
            fs.copy_files(str(entry / name), f"{target}/{name}", local, remote)


def _is_intact(entry: Path) -> bool:
    """Whether an entry is complete and unchanged; its bytes are read once in a process."""
    try:
        written = (entry / MANIFEST).stat().st_mtime_ns
    except FileNotFoundError:
        return False
    return is_complete(entry) and _was_hashed(entry, written)


@lru_cache(maxsize=256)
def _was_hashed(entry: Path, written: int) -> bool:
    return is_complete(entry, hashed=True)


def _can_resume(entry: Path) -> bool:
    """Whether the checkpoint of an entry can be read, if it has one."""
    for stage, name in CHECKPOINT_FILES.items():
        if (entry / name).exists():
            try:
                load_checkpoint(entry / name, stage, torch.device("cpu"), mmap=True)
            except ValueError:
                return False
    return True

"""The cache of trained stages: each is trained once, whoever wants it, on whatever machine.

An entry is a folder named by its stage, its scene and the hash of all that determines it. It is
sealed by a manifest of its files, written last: without one it is unfinished and is gone on with,
with one that its files do not match it is broken and is made again. Whoever makes an entry holds
its lock; the operating system takes the lock from a process that dies, and the next one goes on.

Behind the folder there may be a store shared by several clusters, such as `s3://bucket/cache`.
"""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from filelock import FileLock, Timeout

from cbnerf.files import atomic_write_text
from cbnerf.training.checkpoint import Stage, load_checkpoint
from cbnerf.training.stages import CHECKPOINT_FILES

_MANIFEST = "manifest.json"
_LOCKS = ".locks"
_STAGES: tuple[Stage, ...] = ("field", "refiner")

State = Literal["whole", "unfinished", "in use", "broken"]


class Entry(NamedTuple):
    """An entry as `cbnerf cache list` shows it."""

    folder: Path
    state: State
    num_bytes: int
    last_used: float
    """Seconds since 1970."""


@dataclass(frozen=True)
class StageCache:
    """The entries below a folder; local or on a file system that all machines share."""

    folder: Path
    store: str | None = None
    """URI of pyarrow's file systems, which entries are fetched from and sent to."""

    def path(self, stage: Stage, scene: str, key: str) -> Path:
        """The folder of an entry, there or not."""
        return self.folder / f"{stage}-{scene}-{key}"

    def complete(self, entry: Path, train: Callable[[Path], object], precision: str) -> Path:
        """The entry, whole: found, fetched, or made by `train`, which is given the folder.

        Of several processes that want it one makes it and the others wait. The manifest notes
        `field.precision` as it was settled.
        """
        self._touch(entry)
        if not _is_whole(entry):
            with self._lock(entry):
                if not _is_whole(entry):
                    self._make(entry, train, precision)
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
        """Delete an entry, unless a process is making it."""
        try:
            with self._lock(entry, timeout=0.0):
                shutil.rmtree(entry)
        except Timeout:
            return False
        return True

    def prune(self, *, idle_days: float, max_bytes: float) -> list[Entry]:
        """Remove broken entries, those not used for so long, then the least recently used ones
        until the rest is small enough; returns what was removed."""
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

    def _make(self, entry: Path, train: Callable[[Path], object], precision: str) -> None:
        if (entry / _MANIFEST).exists() or not _can_go_on(entry):
            shutil.rmtree(entry)
        if not entry.exists() and self._fetch(entry):
            return
        train(entry)
        _seal(entry, precision)
        self._send(entry)

    def _state(self, entry: Path, thorough: bool) -> State:
        if not (entry / _MANIFEST).exists():
            return "in use" if self._is_locked(entry) else "unfinished"
        return "whole" if _has_its_files(entry, hashed=thorough) else "broken"

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
        """Note the use, by which old entries are told from idle ones."""
        file = self._lock_file(entry)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()

    def _fetch(self, entry: Path) -> bool:
        """Copy a whole entry from the store, if it has one."""
        if self.store is None:
            return False
        from pyarrow import fs  # comes with Ray; a cache without a store does not need it

        remote, root = fs.FileSystem.from_uri(self.store)
        source = f"{root}/{entry.name}"
        if remote.get_file_info(f"{source}/{_MANIFEST}").type == fs.FileType.NotFound:
            return False
        arriving = entry.with_name(f".{entry.name}.{uuid.uuid4().hex}")
        try:
            arriving.mkdir(parents=True)
            fs.copy_files(source, str(arriving), remote, fs.LocalFileSystem())
            if not _has_its_files(arriving, hashed=True):
                return False
            os.replace(arriving, entry)
        finally:
            shutil.rmtree(arriving, ignore_errors=True)
        return True

    def _send(self, entry: Path) -> None:
        """Copy a whole entry to the store, its manifest last."""
        if self.store is None:
            return
        from pyarrow import fs

        remote, root = fs.FileSystem.from_uri(self.store)
        target = f"{root}/{entry.name}"
        remote.create_dir(target, recursive=True)
        names = [*_read_files(entry), _MANIFEST]
        for name in names:
            fs.copy_files(
                str(entry / name), f"{target}/{name}", fs.LocalFileSystem(), remote
            )  # fmt: skip


def _is_whole(entry: Path) -> bool:
    """Sealed, and unchanged since; the bytes are read once in the life of a process."""
    try:
        sealed = (entry / _MANIFEST).stat().st_mtime_ns
    except FileNotFoundError:
        return False
    return _has_its_files(entry, hashed=False) and _was_hashed(entry, sealed)


@lru_cache(maxsize=256)
def _was_hashed(entry: Path, sealed: int) -> bool:
    return _has_its_files(entry, hashed=True)


def _seal(entry: Path, precision: str) -> None:
    for left in entry.glob(".*"):  # by a save that was killed
        left.unlink()
    files = sorted(file for file in entry.iterdir() if file.name != _MANIFEST)
    hashed = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files}
    manifest = {"precision": precision, "files": hashed}
    atomic_write_text(entry / _MANIFEST, json.dumps(manifest, indent=1))


def _read_files(entry: Path) -> dict[str, dict[str, Any]]:
    """What the manifest says of each file."""
    return json.loads((entry / _MANIFEST).read_text(encoding="utf-8"))["files"]


def _has_its_files(entry: Path, *, hashed: bool) -> bool:
    try:
        files = _read_files(entry)
        return bool(files) and all(
            (entry / name).stat().st_size == about["bytes"]
            and (not hashed or _sha256(entry / name) == about["sha256"])
            for name, about in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # files are missing, or the manifest itself is damaged


def _can_go_on(entry: Path) -> bool:
    """No checkpoint yet, or one that can be read."""
    for stage in _STAGES:
        if (entry / CHECKPOINT_FILES[stage]).exists():
            try:
                load_checkpoint(entry / CHECKPOINT_FILES[stage], stage, torch.device("cpu"))
            except ValueError:
                return False
    return True


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

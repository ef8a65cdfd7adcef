"""Atomic writes of files and folders; checks of disks and paths."""

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_WORDS_OF_NO_SPACE = re.compile(
    r"no space left on device|disk is full|disk quota exceeded|OutOfDiskError", re.IGNORECASE
)
"""Messages of the operating system, SQLite and Ray, which several types of errors carry."""


def is_about_space(error: BaseException | None) -> bool:
    """Whether a full disk has caused an error, by its number, its message or its causes."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            return True
        if _WORDS_OF_NO_SPACE.search(f"{type(error).__name__}: {error}"):
            return True
        there = getattr(error, "cause", None)  # Ray: in another process
        here = error.__cause__ or error.__context__
        error = there if isinstance(there, BaseException) else here
    return False


def check_may_write(folder: Path) -> None:
    """Raise ValueError if a folder is a file, or cannot be written or created."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"{existing}: a file, and not a folder to write to")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{existing}: this user may not write there; give another folder")


def check_output(output: Path) -> None:
    """ValueError for a folder that holds something, or that cannot be written or created."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output}: is there already; give another --output or remove it")
    check_may_write(output)


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `target`; at the end, what was written there replaces
    `target`. After an error nothing is left. A folder can replace only an empty one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        yield unfinished
        os.replace(unfinished, target)
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.unlink(missing_ok=True)


def expand_home(path: Path) -> Path:
    """The path with `~` expanded: a shell does not expand it in `--data=~/photos`."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"{path}: there is no such home folder") from None


def atomic_write_text(target: Path, text: str) -> None:
    """Write a text file, or replace it."""
    with atomic_write(target) as file:
        file.write_text(text, encoding="utf-8")


def drop_torn_line(file: Path) -> None:
    """Cut off a last line without an end, which a killed process or a full disk has left."""
    content = file.read_bytes()
    complete = content.rfind(b"\n") + 1
    if complete < len(content):
        os.truncate(file, complete)

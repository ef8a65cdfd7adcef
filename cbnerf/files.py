"""Files and folders that are there whole or not at all, whoever is killed when."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A path beside `target` for a new file or folder, which takes its place at the end; where
    that fails nothing of it is left. A folder can only take the place of an empty one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        yield unfinished
        os.replace(unfinished, target)
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.unlink(missing_ok=True)


def write_whole(target: Path, text: str) -> None:
    """Write a text file, or replace it."""
    with whole(target) as file:
        file.write_text(text, encoding="utf-8")

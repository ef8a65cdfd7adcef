"""The ends of a command line: folders as people type them, output in any locale, and one line for
an error that nobody foresaw."""

import io
import shlex
import sys
import tempfile
import time
import traceback
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from cbnerf.files import expand_home

_LONGEST = 600
"""Characters of an error that are told."""


def prepare_output() -> None:
    """Print as an escape what the locale cannot encode; a name must not end a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def expand_homes(options: Any) -> None:
    """Replace `~` in the paths of a dataclass: a shell leaves `--storage=~/runs` as it is."""
    for entry in fields(options):
        value = getattr(options, entry.name)
        if isinstance(value, Path):
            setattr(options, entry.name, expand_home(value))
        elif isinstance(value, tuple):
            every = tuple(expand_home(v) if isinstance(v, Path) else v for v in value)
            setattr(options, entry.name, every)


def fail(program: str, message: object, status: int) -> NoReturn:
    """End with one line, whatever breaks it, and an exit status."""
    print(f"{program}: {' '.join(str(message).splitlines())}", file=sys.stderr)
    sys.exit(status)


def one_line(message: object) -> str:
    """The end of a message, which holds the cause, without line breaks."""
    return " ".join(str(message).split())[-_LONGEST:]


def explain_unforeseen(error: BaseException, storage: Path, say: str | None = None) -> str:
    """One line on an error, `say` or else its own words, that names the file of its traceback: in
    the storage if there is one, else in the temporary folder."""
    say = say or f"{type(error).__name__}: {one_line(error)}".removesuffix(": ")
    text = "".join(traceback.format_exception(error))
    for folder in (storage, None):
        try:
            stamp = time.strftime("%Y%m%d-%H%M%S-")
            descriptor, file = tempfile.mkstemp(".txt", f"error-{stamp}", folder)
            with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(text)
            return f"{say}; traceback in {shlex.quote(file)}"
        except OSError:  # There is no such folder, it is full, or somebody else's.
            continue
    return f"{say}; its traceback could not be kept"

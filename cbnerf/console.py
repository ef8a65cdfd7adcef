"""Input and output of a command line: `~` in paths, output in any locale, one-line errors."""

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
"""Maximum number of characters of an error message."""


def prepare_output() -> None:
    """Escape characters that the locale cannot encode, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def expand_homes(options: Any) -> None:
    """Expand `~` in the paths of a dataclass: a shell does not expand `--storage=~/runs`."""
    for entry in fields(options):
        value = getattr(options, entry.name)
        if isinstance(value, Path):
            setattr(options, entry.name, expand_home(value))
        elif isinstance(value, tuple):
            every = tuple(expand_home(v) if isinstance(v, Path) else v for v in value)
            setattr(options, entry.name, every)


def fail(program: str, message: object, status: int) -> NoReturn:
    """Print one line, without line breaks, and exit with a status."""
    print(f"{program}: {' '.join(str(message).splitlines())}", file=sys.stderr)
    sys.exit(status)


def one_line(message: object) -> str:
    """The end of a message, which usually holds the cause, without line breaks."""
    return " ".join(str(message).split())[-_LONGEST:]


def explain_unforeseen(error: BaseException, storage: Path, say: str | None = None) -> str:
    """Write the traceback of an error to a file, in the storage if it exists, else in the temporary
    folder. Returns one line: `say` or the error's own message, and the name of that file."""
    say = say or f"{type(error).__name__}: {one_line(error)}".removesuffix(": ")
    text = "".join(traceback.format_exception(error))
    for folder in (storage, None):
        try:
            stamp = time.strftime("%Y%m%d-%H%M%S-")
            descriptor, file = tempfile.mkstemp(".txt", f"error-{stamp}", folder)
            with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(text)
            return f"{say}; traceback in {shlex.quote(file)}"
        except OSError:  # The folder is missing, full or not writable.
            continue
    return f"{say}; its traceback could not be kept"

"""The curves of a unit: `metrics.jsonl` in its trial folder, one JSON object a line.

The process that trains the unit appends lines, and the driver reads them meanwhile. The first line
of a process says where it runs: `{"node", "time"}`; a line for each evaluation adds
`{"step", "metrics"}`. `time` is in milliseconds since 1970, as in MLflow.
"""

import json
import platform
import time
from pathlib import Path
from typing import NamedTuple

from cbnerf.files import drop_torn_line

CURVES_FILE = "metrics.jsonl"


class Point(NamedTuple):
    """The metrics of one evaluation."""

    time: int
    metrics: dict[str, float]


class Curves(NamedTuple):
    """What a unit has written so far."""

    node: str = ""
    """Host name of the machine that trains it; empty if it has not begun."""
    points: dict[int, Point] = {}
    """By step; a step that a resumed unit has repeated has its last metrics."""


def begin_curves(folder: Path) -> None:
    """Note that this process trains the unit of a trial folder from now on."""
    reserve_curves(folder)
    drop_torn_line(folder / CURVES_FILE)
    _append(folder, {})


def append_point(folder: Path, step: int, metrics: dict[str, float]) -> None:
    _append(folder, {"step": step, "metrics": metrics})


def reserve_curves(folder: Path) -> None:
    """Create the file before a unit starts elsewhere: an NFS client may remember for a minute that
    a file does not exist, but it sees the latest content of one that does."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CURVES_FILE).touch()


def read_curves(folder: Path) -> Curves:
    """The curves in a trial folder, without a last line that is not complete yet."""
    try:
        content = (folder / CURVES_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return Curves()
    entries = [json.loads(line) for line in content.split("\n")[:-1]]
    points = {e["step"]: Point(e["time"], e["metrics"]) for e in entries if "step" in e}
    return Curves(entries[-1]["node"], points) if entries else Curves()


def _append(folder: Path, entry: dict) -> None:
    about = {"node": platform.node(), "time": int(time.time() * 1000)}
    with (folder / CURVES_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(about | entry) + "\n")

"""The curves of a unit: `metrics.jsonl` in its trial folder, one JSON object a line.

The process that trains the unit appends points while the driver reads them. It appends a point
without metrics at step 0 when it begins or resumes.
"""

import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cbnerf.files import drop_torn_line

CURVES_FILE = "metrics.jsonl"


class Point(NamedTuple):
    """The metrics of one evaluation."""

    step: int
    metrics: dict[str, float]
    node: str
    """Host name of the machine that trains the unit."""
    time: int
    """Milliseconds since 1970, as in MLflow."""


def reserve_curves(folder: Path) -> None:
    """Create the file before a unit starts elsewhere: an NFS client may remember for a minute that
    a file does not exist, but it sees the latest content of one that does."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CURVES_FILE).touch()


def begin_curves(folder: Path) -> None:
    """Record that this process begins, or resumes, the unit of a trial folder."""
    reserve_curves(folder)
    drop_torn_line(folder / CURVES_FILE)
    append_point(folder, 0, {})


def append_point(folder: Path, step: int, metrics: dict[str, float]) -> None:
    """Add an evaluation of the unit that this process trains."""
    point = Point(step, metrics, platform.node(), int(time.time() * 1000))
    with (folder / CURVES_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(point._asdict()) + "\n")


def first_and_last(points: Sequence[Point]) -> tuple[int | None, int | None]:
    """Times of the first and the last point, in milliseconds since 1970; None without points."""
    times = [point.time for point in points]
    return min(times, default=None), max(times, default=None)


def read_curves(folder: Path) -> list[Point]:
    """The points of a unit by step, the last one of each step; empty if it has not begun.

    A last line that is not complete is ignored.
    """
    try:
        content = (folder / CURVES_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    points = [Point(**json.loads(line)) for line in content.split("\n")[:-1]]
    return [point for _, point in sorted({point.step: point for point in points}.items())]

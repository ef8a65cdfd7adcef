"""Cameras of photographs by structure from motion, in a process of its own: see `sfm_process`."""

import importlib.util
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cbnerf.data import colmap
from cbnerf.data.cameras import Registration
from cbnerf.data.sfm_process import RESULT_FILE, TASK_FILE

Progress = Callable[[str, int, int], None]
"""Called with the name of a step, the amount done, and the total."""


class PhotographedWith(NamedTuple):
    """What is known of the lens of an image; images with equal entries share a camera."""

    width: int
    height: int
    focal: float | None
    """Focal length in pixels."""
    original: tuple[int, int]
    """Size before the image was shrunk."""


class Reconstruction(NamedTuple):
    """Cameras of the photographs that could be placed, sorted by name."""

    cameras: Registration
    points: int
    error: float
    """Mean reprojection error in pixels."""
    parallax: float
    """Median over all points of the largest angle between two cameras that see it, in degrees."""


def check_pycolmap() -> None:
    """ValueError where pycolmap is not installed."""
    if importlib.util.find_spec("pycolmap") is None:
        raise ValueError("pycolmap is not installed; pip install 'cbnerf[photos]'")


def reconstruct(
    folder: Path, lenses: dict[str, PhotographedWith], progress: Progress
) -> Reconstruction | None:
    """Find the cameras of `folder/images`; None if no two images fit together.

    `lenses` has an entry for each image by its name. COLMAP's files are left in the folder.
    """
    groups: dict[PhotographedWith, list[str]] = defaultdict(list)
    for name, lens in sorted(lenses.items()):
        groups[lens].append(name)
    task = [
        (names, f"{lens.focal},{lens.width / 2},{lens.height / 2},0" if lens.focal else "")
        for lens, names in groups.items()
    ]
    (folder / TASK_FILE).write_text(json.dumps(task), encoding="utf-8")
    _run(folder, progress)
    result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    if not result:
        return None
    return Reconstruction(colmap.read_cameras(folder / "sparse").sorted(), **result)


def _run(folder: Path, progress: Progress) -> None:
    log = folder / "log.txt"
    command = [sys.executable, "-m", "cbnerf.data.sfm_process", str(folder)]
    with (
        log.open("wb") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            for line in process.stdout or ():
                if line.startswith("["):
                    progress(*json.loads(line))
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        said = " ".join(log.read_text(encoding="utf-8", errors="replace").split())[-300:]
        raise RuntimeError(f"structure from motion ended with status {process.returncode}: {said}")

"""`cbnerf import`: photographs, or a video, become a scene folder."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cbnerf.data.importing import MIN_PHOTOGRAPHS, import_photographs
from cbnerf.data.video_frames import write_sharp_frames
from cbnerf.files import check_output
from cbnerf.progress import time_left

_SILENCE = 5.0
"""Seconds between two lines about the same step."""


@dataclass(kw_only=True)
class Import:
    """Find the cameras of photographs and write a scene folder (extra `photos`)."""

    photos: Annotated[Path, tyro.conf.Positional]
    """Folder of photographs (JPEG, PNG, TIFF, WebP, HEIC); a video with --from-video."""
    output: Path
    """Scene folder to write; it must not exist."""
    width: int = 1008
    """Largest width of the photographs in pixels; larger ones are shrunk first."""
    from_video: bool = False
    """Take the sharpest frames of a video."""
    frames: int = 40
    """Number of frames of a video."""
    force: bool = False
    """Go on with poor captures, without the photographs that do not fit."""

    def run(self) -> None:
        if self.width < 16 or self.frames < MIN_PHOTOGRAPHS:
            raise ValueError(f"--width must be at least 16, --frames at least {MIN_PHOTOGRAPHS}")
        check_output(self.output)
        with tempfile.TemporaryDirectory() as folder:
            photos, progress = self.photos, _Progress()
            if self.from_video:
                photos = Path(folder) / self.photos.name
                photos.mkdir()
                write_sharp_frames(self.photos, photos, self.frames, progress)
            note = import_photographs(
                photos, self.output, width=self.width, force=self.force, progress=progress
            )
        print(f"{self.output}:\n{note}", end="")


class _Progress:
    """Prints a line when a step starts, ends, and every few seconds, with the time that is left."""

    def __init__(self) -> None:
        self._step, self._started, self._told = "", 0.0, 0.0

    def __call__(self, step: str, done: int, total: int) -> None:
        now = time.monotonic()
        if step != self._step:
            self._step, self._started, self._told = step, now, 0.0
        elapsed = now - self._started
        if done < total and now - self._told < _SILENCE:
            return
        self._told = now
        left = f", {time_left(elapsed, done, total)} left" if elapsed and done < total else ""
        print(f"{step}  {done}/{total}{left}", flush=True)

"""Sharp frames of a video, as photographs."""

import logging
import math
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import imageio.v3 as iio
from PIL import Image

from cbnerf.data.importing import measure_sharpness
from cbnerf.data.structure_from_motion import Progress


def write_sharp_frames(video: Path, folder: Path, count: int, progress: Progress) -> None:
    """Write the sharpest frame of each of `count` equal parts of a video.

    ValueError for a file that is no video, or has fewer frames.
    """
    if not video.is_file():
        raise ValueError(f"{video}: no such video")
    number = 0
    for part, frames in groupby(_read_frames(video, count), key=lambda frame: frame[0]):
        sharpest, best = None, -1.0
        for _, frame in frames:
            number += 1
            if (sharpness := measure_sharpness(frame)) > best:
                sharpest, best = frame, sharpness
        assert sharpest
        sharpest.save(folder / f"frame{part:03d}.png")
        progress("parts of the video read", part + 1, count)
    if number < count:
        raise ValueError(f"{video}: has only {number} frames; give --frames {number}")


def _read_frames(video: Path, count: int) -> Iterator[tuple[int, Image.Image]]:
    """The frames of a video, upright, each with the part that it belongs to."""
    # It warns of every video that its camera has turned.
    logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)
    try:
        about = iio.immeta(video, plugin="FFMPEG")
        total = max(math.ceil(about["duration"] * about["fps"]), 1)
        for number, frame in enumerate(iio.imiter(video, plugin="FFMPEG")):
            yield min(number * count // total, count - 1), Image.fromarray(frame)
    except Exception as error:  # imageio's plugin can raise anything
        raise ValueError(f"{video}: not a video ({' '.join(str(error).split())[-200:]})") from None

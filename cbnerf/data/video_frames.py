"""Sharp frames of a video, as photographs."""

import math
from pathlib import Path

import imageio.v3 as iio
from PIL import Image

from cbnerf.data.importing import measure_sharpness


def write_sharp_frames(video: Path, folder: Path, count: int) -> None:
    """Write the sharpest frame of each of `count` equal parts of a video.

    ValueError for a file that is no video, or has fewer frames.
    """
    if not video.is_file():
        raise ValueError(f"{video}: no such video")
    best: dict[int, tuple[float, Image.Image]] = {}
    try:
        about = iio.immeta(video, plugin="FFMPEG")
        total = math.ceil(about["duration"] * about["fps"])
        for number, frame in enumerate(iio.imiter(video, plugin="FFMPEG")):
            part = min(number * count // max(total, 1), count - 1)
            image = Image.fromarray(frame)
            sharpness = measure_sharpness(image)
            if part not in best or sharpness > best[part][0]:
                best[part] = sharpness, image
    except Exception as error:  # imageio's plugin can raise anything
        raise ValueError(f"{video}: not a video ({' '.join(str(error).split())[-200:]})") from None
    if len(best) < count:
        raise ValueError(f"{video}: has only {len(best)} frames; give --frames {len(best)}")
    for part, (_, image) in best.items():
        image.save(folder / f"frame{part:03d}.png")

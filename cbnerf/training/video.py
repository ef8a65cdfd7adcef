"""Videos of novel views: stage 1 and refined along the same path, with their warping error."""

import json
from pathlib import Path

import imageio.v3 as iio
from jaxtyping import UInt8
from torch import Tensor

from cbnerf.codebook.refiner import DEFAULT_TILE, Refiner
from cbnerf.files import atomic_write_text
from cbnerf.nerf.model import FieldModel
from cbnerf.nerf.rays import Cameras
from cbnerf.nerf.warp import warping_error
from cbnerf.training.evaluation import refine_views, render_views

VIDEO_FILE = "video.json"


def write_videos(
    model: FieldModel,
    path: Cameras,
    scale: int,
    refiner: Refiner | None,
    folder: Path,
    *,
    fps: int,
    tile: int = DEFAULT_TILE,
) -> dict[str, float]:
    """Write stage1.mp4 and, with a refiner, refined.mp4, their frames as PNG, and video.json.

    Returns `NAME/warping_error` (colours in [0, 1]) of each video, and `seen`, the share of pixels
    that this mean covers; empty for a single frame.
    """
    device = path.camera_to_world.device
    num_frames = len(path.camera_to_world)
    renders = render_views(model, path, list(range(num_frames)), scale)
    videos = {"stage1": renders.rgb}
    if refiner is not None:
        videos["refined"] = refine_views(refiner, renders, device, tile=tile)
    folder.mkdir(parents=True, exist_ok=True)
    metrics: dict[str, float] = {}
    for name, frames in videos.items():
        write_video(frames, folder, name, fps)
        if num_frames > 1:
            result = warping_error(frames.float() / 255, renders.depth.float(), path.to("cpu"))
            metrics |= {f"{name}/warping_error": result.error, "seen": result.seen}
    atomic_write_text(folder / VIDEO_FILE, json.dumps(metrics, indent=1))
    return metrics


def write_video(
    frames: UInt8[Tensor, "frames height width 3"], folder: Path, name: str, fps: int
) -> None:
    """NAME.mp4 and NAME-000.png, NAME-001.png, ..."""
    for number, frame in enumerate(frames):
        iio.imwrite(folder / f"{name}-{number:03d}.png", frame.numpy())
    # Video codecs need even sides.
    _, height, width, _ = frames.shape
    even = frames[:, : height // 2 * 2, : width // 2 * 2]
    iio.imwrite(folder / f"{name}.mp4", even.numpy(), plugin="FFMPEG", fps=fps, macro_block_size=2)

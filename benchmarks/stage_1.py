"""The stage-1 renders that benchmarks of refiners share, and the options for them."""

from dataclasses import dataclass
from pathlib import Path

from cbnerf.config import Config
from cbnerf.data.captures import read_capture
from cbnerf.data.renders import Renders, load_renders
from cbnerf.data.scene import Scene, make_scene
from cbnerf.training.distributed import choose_device
from cbnerf.training.stages import RENDERS_FILE, run_field


@dataclass(kw_only=True)
class Options:
    data: Path
    """Folder of LLFF scene folders."""
    cache: Path
    """Receives the stage-1 fields and renders, which later runs use again."""
    scenes: tuple[str, ...] = ("fern", "flower", "room")
    resolution: str = "x2-128"
    field_steps: int = 1500
    """Updates of stage 1."""
    threads: int = 1


def render_stage_1(
    config: Config, data: Path, name: str, cache: Path, *, below: bool = False
) -> tuple[Scene, Renders]:
    """The scene `data/name` and the renders of its field, which is trained unless `cache` has it;
    with `below`, those a scale below."""
    scene = make_scene(read_capture(data / name, config.data.width), config.data)
    folder = cache / f"x{config.data.scale}-{config.data.width}-{config.field.optim.steps}" / name
    if below:
        scene = scene.scale_below(config.data.low_res_kernel)
        folder = folder.with_name(f"{name}@low-res")
    run_field(config, scene, folder, device=choose_device())
    return scene, load_renders(folder / RENDERS_FILE)

"""Nearest codes on a CPU: the kernel that skips codes beside all distances, in one run.

    python benchmarks/nearest.py --cache runs/nearest

Latents and codes are those that `cb-nerf` starts from on a built-in scene at 128x96: for each
codebook size, k-means alone, and the nearest code and the four nearest of each pixel of all
training views. Times are CPU seconds of one thread, the least of `--repeats`, taken in turn. Prints
and writes the table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from clock import clock
from provenance import provenance

from cbnerf import kernels
from cbnerf.codebook.encoders import pad
from cbnerf.codebook.nearest import find_nearest, find_neighbours
from cbnerf.codebook.quantizer import VectorQuantizer
from cbnerf.codebook.refiner import Refiner
from cbnerf.codebook.views import Views
from cbnerf.data.library import load_scene
from cbnerf.data.renders import load_renders
from cbnerf.data.splits import split_views
from cbnerf.overrides import with_overrides
from cbnerf.presets import preset
from cbnerf.training.evaluation import sr_views, unit_views
from cbnerf.training.models import build_refiner
from cbnerf.training.stages import RENDERS_FILE, run_field

CPU = torch.device("cpu")


@dataclass(kw_only=True)
class Options:
    cache: Path
    """Receives the built-in scene and its stage 1, which later runs use again."""
    scene: str = "coral"
    sizes: tuple[int, ...] = (256, 1024, 4096)
    repeats: int = 3
    output: Path = Path("benchmarks/results/quantizer/nearest-cpu.md")


def main(options: Options) -> None:
    torch.set_num_threads(1)
    config = preset("cb-nerf", "x2-128")
    scene = load_scene(options.scene, None, options.cache, config.data)
    run_field(config, scene, options.cache / "field", device=CPU)
    renders = load_renders(options.cache / "field" / RENDERS_FILE)
    train = split_views(scene.num_views, config.data).train
    views = Views(sr_views(renders.of(train), CPU), unit_views(scene.images[train], CPU))
    lines = [
        f"# Nearest codes: {options.scene}, {len(train)} views of 128x96\n",
        provenance(1),
        "| codes | search | all distances | kernel | ratio |",
        "|---:|---|---:|---:|---:|",
    ]
    for size in options.sizes:
        refiner = build_refiner(with_overrides(config, {"codebook.size": size}))
        for name, search in _searches(refiner, views).items():
            slow, fast = _time(search, options.repeats)
            lines.append(f"| {size} | {name} | {slow:.2f} s | {fast:.2f} s | {slow / fast:.1f}x |")
            print(lines[-1], flush=True)
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _searches(refiner: Refiner, views: Views) -> dict[str, Callable[[], object]]:
    refiner.start_from(views)
    assert refiner.autoencoder is not None
    encode, quantizer = refiner.autoencoder.encode_sr, refiner.autoencoder.quantizer
    assert isinstance(quantizer, VectorQuantizer)
    with torch.no_grad():
        latents = torch.cat([encode(pad(view)).flatten(0, 2) for view in views.renders])
    mixed, codes = latents[torch.randperm(len(latents))], quantizer.codes().detach()
    return {
        "k-means": lambda: quantizer.start_from(mixed),
        "nearest": lambda: find_nearest(latents, codes),
        "four nearest": lambda: find_neighbours(latents, codes, 4),
    }


def _time(search: Callable[[], object], repeats: int) -> list[float]:
    """Least CPU seconds of a search, without and with the kernel."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repeats + 1):
        for has_kernel, found in seconds.items():
            kernels.HAS_NUMBA = has_kernel
            begin = clock(CPU)
            search()
            found.append(clock(CPU) - begin)
    return [min(found[1:]) for found in seconds.values()]  # the first one compiles


if __name__ == "__main__":
    main(tyro.cli(Options))

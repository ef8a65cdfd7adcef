"""What stage 1 costs as images grow, views are added, the scale rises, processes join.

    python benchmarks/scaling.py

Each row is measured in processes of their own, with one thread each: CPU milliseconds of a training
step, CPU seconds of a rendered high-res frame, peak memory; for several gloo processes, which share
the batch, the wall clock beside that of one, and how far their render lies from its render.
"""

import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import tyro
from provenance import provenance

from cbnerf.config import Config
from cbnerf.data.library import make_capture
from cbnerf.data.scene import Scene, make_scene
from cbnerf.nerf.model import render_image
from cbnerf.overrides import with_overrides
from cbnerf.presets import preset
from cbnerf.training.field import train_field

CPU = torch.device("cpu")


@dataclass(kw_only=True)
class Options:
    resolution: str = "x2-252"
    scene: str = "pebbles"
    """A built-in scene."""
    widths: tuple[int, ...] = (128, 252, 504, 1008)
    views: tuple[int, ...] = (8, 16, 32, 64)
    scales: tuple[int, ...] = (1, 2, 4)
    processes: tuple[int, ...] = (1, 2, 4)
    steps: int = 20
    output: Path = Path("benchmarks/results/field")
    """Receives scaling-cpu.md, scaling-cpu.json and scaling-cpu.png."""


Row = dict[str, Any]


def main(options: Options) -> None:
    sizes = [_measure(options, width=width) for width in options.widths]
    views = [_measure(options, views=number) for number in options.views]
    scales = [_measure(options, scale=scale) for scale in options.scales]
    processes = _measure_processes(options)
    options.output.mkdir(parents=True, exist_ok=True)
    tables = {"width": sizes, "views": views, "scale": scales, "processes": processes}
    lines = [f"# What stage 1 costs ({options.resolution} where nothing else is said)\n"]
    lines.append(provenance(threads=1))
    for rows in tables.values():
        lines += [f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0])]
        lines += [f"| {' | '.join(str(value) for value in row.values())} |" for row in rows]
        lines.append("")
    file = options.output / "scaling-cpu"
    file.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    file.with_suffix(".json").write_text(json.dumps(tables, indent=1), encoding="utf-8")
    _plot(tables, file.with_suffix(".png"))
    print("\n".join(lines))


def _measure(options: Options, *, width: int = 252, views: int = 16, scale: int = 2) -> Row:
    size = {"data.width": width, "data.scale": scale}
    config = _config(options, size)
    (measured,) = _in_processes(_train_and_render, 1, options, config, views)
    row = {"width": width, "views": views, "scale": scale} | measured
    print(row, flush=True)
    return row


def _measure_processes(options: Options) -> list[Row]:
    rows: list[Row] = []
    alone: list[tuple[float, np.ndarray]] = []
    for number in options.processes:
        config = _config(options, {})
        together = _in_processes(_train_together, number, options, config, 16)
        alone = alone or together
        step = max(seconds for seconds, _ in together)
        cores = min(number, os.cpu_count() or 1)
        row = {
            "processes": number,
            "ms of a step, wall clock": round(1e3 * step, 1),
            "efficiency on the cores in use": f"{alone[0][0] / step / cores:.0%}",
            "largest difference of a pixel": f"{np.abs(together[0][1] - alone[0][1]).max():.1e}",
        }
        print(row, flush=True)
        rows.append(row)
    return rows


def _config(options: Options, changes: dict[str, Any]) -> Config:
    short = {"field.optim.steps": options.steps, "field.optim.evaluations": 1}
    config = preset("cb-nerf", options.resolution)
    return with_overrides(config, {"data.validation": False} | short | changes)


def _in_processes(job: Callable, number: int, *arguments: Any) -> list[Any]:
    """Results of `job(rank, number, rendezvous, *arguments)` of each process."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(number) as pool:
        rendezvous = f"file://{folder}/rendezvous"
        ranks = [(rank, number, rendezvous, *arguments) for rank in range(number)]
        return pool.starmap(job, ranks, chunksize=1)


def _train_and_render(
    rank: int, number: int, rendezvous: str, options: Options, config: Config, views: int
) -> Row:
    torch.set_num_threads(1)
    scene = _scene(options, config, views)
    train = _trainer(config, scene)
    train()
    since = time.process_time()
    model = train()
    step = (time.process_time() - since) / options.steps
    since = time.process_time()
    render_image(model, scene.cameras(CPU), 0, scene.scale)
    frame = time.process_time() - since
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "parameters": f"{parameters / 1e6:.1f} M",
        "ms of a step": round(1e3 * step, 1),
        "s of a frame": round(frame, 2),
        "peak MiB": round(peak),
    }


def _train_together(
    rank: int, number: int, rendezvous: str, options: Options, config: Config, views: int
) -> tuple[float, np.ndarray]:
    """Seconds of a step, and a render of the first view."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=number)
    scene = _scene(options, config, views)
    train = _trainer(config, scene)
    train()
    dist.barrier()
    since = time.perf_counter()
    model = train()
    seconds = time.perf_counter() - since
    dist.barrier()
    dist.destroy_process_group()
    rgb, _ = render_image(model, scene.cameras(CPU), 0, scene.scale)
    return seconds / options.steps, rgb.numpy()


def _scene(options: Options, config: Config, views: int) -> Scene:
    capture = make_capture(options.scene, width=config.data.width, num_views=views)
    return make_scene(capture, config.data)


def _trainer(config: Config, scene: Scene) -> Callable:
    return lambda: train_field(config, scene, device=CPU, report=lambda *_: None)


def _plot(tables: dict[str, list[Row]], path: Path) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(13, 3), layout="constrained")
    costs = {"ms of a step": "step (ms)", "s of a frame": "frame (s)", "peak MiB": "peak (MiB)"}
    for axis, (name, rows) in zip(axes, tables.items(), strict=True):
        x = [row[name] for row in rows]
        for cost, label in (costs | {"ms of a step, wall clock": "step, wall clock (ms)"}).items():
            if cost in rows[0]:
                axis.loglog(x, [row[cost] for row in rows], marker="o", label=label)
        axis.set_xticks(x, [str(value) for value in x])
        axis.minorticks_off()
        axis.set_xlabel({"width": "image width (px)"}.get(name, name))
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[3].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main(tyro.cli(Options))

"""Stage 1 with depth bounds that are too near: PSNR of validation views.

Structure from motion leaves outliers, so near bounds come out several times too near; here they are
made so on purpose. `--official` holds better bounds of the scene.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from provenance import provenance

from cbnerf.config import Config
from cbnerf.data.captures import read_capture
from cbnerf.data.library import make_capture
from cbnerf.data.scene import Capture, make_scene
from cbnerf.overrides import read_knob, with_overrides
from cbnerf.presets import preset
from cbnerf.report.tables import Cell, Table, to_markdown
from cbnerf.training.checkpoint import Checkpoint
from cbnerf.training.distributed import choose_device
from cbnerf.training.field import train_field


@dataclass(kw_only=True)
class Options:
    scene: str = "coral"
    """A built-in scene, or a folder below `data`."""
    data: Path | None = None
    official: Path | None = None
    """`bounds_official.npy` of the scene: one row for each view."""
    resolution: str = "x2-128"
    seeds: int = 1
    overrides: tuple[str, ...] = ()
    """Further knobs; `field.planes.depth_steps=0` trusts the bounds."""
    threads: int = 1
    output: Path | None = None


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    knobs = dict(item.split("=", 1) for item in options.overrides)
    parsed = {name: read_knob(name, value) for name, value in knobs.items()}
    config = with_overrides(preset("cb-nerf", options.resolution), parsed)
    width = config.data.width
    capture = (
        read_capture(options.data / options.scene, width)
        if options.data
        else make_capture(options.scene, width=width)
    )
    rows = []
    for name, changed in _variants(capture, options.official).items():
        own = [_train(with_overrides(config, {"seed": s}), changed) for s in range(options.seeds)]
        values = [*own, sum(own) / len(own)]
        rows.append([Cell(text) for text in (name, *(f"{value:.2f}" for value in values))])
        print(name, *values, flush=True)
    header = ["bounds", *(f"seed {seed}" for seed in range(options.seeds)), "mean"]
    text = to_markdown(Table(f"{options.scene}, {options.resolution}", header, rows))
    text += "\n\n" + provenance(options.threads)
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


def _variants(capture: Capture, official: Path | None) -> dict[str, Capture]:
    """The capture with its own bounds and with nearer ones."""
    variants = {"own": capture}
    for factor in (2, 5):
        bounds = capture.bounds.clone()
        bounds[:, 0] /= factor
        variants[f"all near bounds / {factor}"] = capture._replace(bounds=bounds)
    bounds = capture.bounds.clone()
    bounds[0, 0] /= 1000
    variants["one near bound / 1000"] = capture._replace(bounds=bounds)
    if official:
        bounds = torch.from_numpy(np.load(official)).float().expand_as(capture.bounds)
        variants["official"] = capture._replace(bounds=bounds)
    return variants


def _train(config: Config, capture: Capture) -> float:
    """PSNR of the validation views in dB, at the end."""
    last: dict[str, float] = {}

    def keep(step: int, metrics: dict[str, float], checkpoint: Checkpoint, /) -> None:
        last.update(metrics)

    train_field(config, make_scene(capture, config.data), device=choose_device(), report=keep)
    return last["val/psnr"]


if __name__ == "__main__":
    main(tyro.cli(Options))

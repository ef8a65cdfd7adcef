"""Run a stage in a folder: train, checkpoint as it goes, leave results that the next step reads.

A folder that holds an unfinished checkpoint is gone on with; a finished one is left as it is; one
of other knobs is refused. `metrics.json` is written last, so it marks a finished folder.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as iio
import torch
from torch import nn

from cbnerf.config import Config, OptimConfig
from cbnerf.data.references import find_references
from cbnerf.data.renders import Renders, save_renders
from cbnerf.data.scene import Scene
from cbnerf.data.splits import split_views
from cbnerf.files import atomic_write_text
from cbnerf.overrides import save_config
from cbnerf.training.checkpoint import (
    Checkpoint,
    Stage,
    is_trained_with,
    load_checkpoint,
    save_checkpoint,
)
from cbnerf.training.distributed import from_rank_0, process_rank
from cbnerf.training.evaluation import image_strip, refine_views, render_views
from cbnerf.training.field import scene_cameras, train_field
from cbnerf.training.loop import Report
from cbnerf.training.refiner import Pairs, train_refiner, trained_on

FIELD_FILE, REFINER_FILE, RENDERS_FILE = "field.pt", "refiner.pt", "renders.npz"
CHECKPOINT_FILES: dict[Stage, str] = {"field": FIELD_FILE, "refiner": REFINER_FILE}
METRICS_FILE, STRIP_FILE, CONFIG_FILE = "metrics.json", "strip.png", "config.yaml"


def ignore(step: int, metrics: dict[str, float], checkpoint: Checkpoint, /) -> None:
    """A report that nobody reads."""


def run_field(
    config: Config,
    scene: Scene,
    folder: Path,
    *,
    device: torch.device,
    report: Report = ignore,
    until: int | None = None,
) -> dict[str, float]:
    """Train stage 1 and render all views; returns the last metrics, `seconds` and `parameters`.

    With `until` it stops after that many steps, and a later call goes on from there.
    """

    def train(keep: Report, resume_from: Path | None) -> nn.Module:
        model = train_field(
            config, scene, device=device, report=keep, resume_from=resume_from, until=until
        )
        if process_rank() == 0 and _is_whole(until, config.field.optim):
            cameras = scene_cameras(scene, device)
            views = list(range(scene.num_views))
            renders = render_views(model, cameras, views, scene.scale)
            save_renders(renders, folder / RENDERS_FILE)
        return model

    return _run(config, "field", scene.name, folder, train, report, until)


def run_refiner(
    config: Config,
    scene: Scene,
    renders: Renders,
    folder: Path,
    *,
    device: torch.device,
    report: Report = ignore,
    joint: Pairs = (),
    sources: Pairs = (),
    until: int | None = None,
) -> dict[str, float]:
    """Train stage 2 and write a strip (photograph | stage 1 | refined) of a validation view.

    With `joint` it is trained on those scenes, too, and validated on all (`codebook.shared`); with
    `sources` on those scenes alone (protocols `unseen-scene` and `low-res-only`). With `until` it
    stops after that many steps, and a later call goes on from there.
    """

    def train(keep: Report, resume_from: Path | None) -> nn.Module:
        refiner = train_refiner(
            config, scene, renders, device=device, report=keep, resume_from=resume_from,
            joint=joint, sources=sources, until=until,
        )  # fmt: skip
        if process_rank() == 0 and _is_whole(until, config.refiner.optim):
            view = (split_views(scene.num_views, config.data).val or [0])[0]
            references = find_references(config, scene, renders, [view])
            refined = refine_views(refiner, renders.rgb[[view]], device, references)[0]
            strip = image_strip([scene.images[view], renders.rgb[view], refined])
            iio.imwrite(folder / STRIP_FILE, strip.numpy())
        return refiner

    scenes = trained_on(scene, joint, sources)
    return _run(config, "refiner", scenes, folder, train, report, until)


def read_metrics(folder: Path) -> dict[str, float] | None:
    """The metrics of a finished folder, or None."""
    file = folder / METRICS_FILE
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise ValueError(f"{file}: damaged; remove its folder to train again") from None


def _run(
    config: Config,
    stage: Stage,
    scenes: str,
    folder: Path,
    train: Callable[[Report, Path | None], nn.Module],
    report: Report,
    until: int | None,
) -> dict[str, float]:
    found = from_rank_0(lambda: _look(config, stage, scenes, folder))
    if found.finished is not None:
        return found.finished
    path = folder / CHECKPOINT_FILES[stage]
    last = found.begun or {}
    before, started = last.get("seconds", 0.0), time.monotonic()

    def keep(step: int, metrics: dict[str, float], checkpoint: Checkpoint, /) -> None:
        nonlocal last
        last = metrics | {"seconds": before + time.monotonic() - started}
        if process_rank() == 0:
            save_checkpoint(checkpoint._replace(metrics=last), path)
        report(step, metrics, checkpoint)

    model = train(keep, None if found.begun is None else path)
    optim = config.field.optim if stage == "field" else config.refiner.optim
    if process_rank() == 0 and _is_whole(until, optim):
        last = last | {
            "seconds": before + time.monotonic() - started,  # including the renders
            "parameters": float(sum(parameter.numel() for parameter in model.parameters())),
        }
        atomic_write_text(folder / METRICS_FILE, json.dumps(last, indent=1))
    return last


class _Found(NamedTuple):
    """What a folder holds."""

    finished: dict[str, float] | None = None
    """Metrics of a finished training."""
    begun: dict[str, float] | None = None
    """Metrics of the last checkpoint of one that is not."""


def _look(config: Config, stage: Stage, scenes: str, folder: Path) -> _Found:
    """What to go on with in a folder, which is made and given its configuration if it is new."""
    finished = read_metrics(folder)
    if finished is not None:
        _check_finished(config, stage, scenes, folder)
        return _Found(finished=finished)
    path = folder / CHECKPOINT_FILES[stage]
    if path.exists():  # A folder may have been left at any of its checkpoints, the last one, too.
        return _Found(begun=load_checkpoint(path, stage, torch.device("cpu")).metrics)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / CONFIG_FILE)
    return _Found()


def _is_whole(until: int | None, optim: OptimConfig) -> bool:
    return until is None or until >= optim.steps


def _check_finished(config: Config, stage: Stage, scenes: str, folder: Path) -> None:
    checkpoint = load_checkpoint(folder / CHECKPOINT_FILES[stage], stage, torch.device("cpu"))
    if checkpoint.scene != scenes:
        other = f"the scene {checkpoint.scene}, not {scenes}"
    elif not is_trained_with(checkpoint, config):
        other = "other knobs"
    else:
        return
    raise ValueError(f"{folder}: finished with {other}; choose another folder or remove it")

"""Run a stage in a folder: train, checkpoint as it goes, leave results that the next step reads.

A folder that holds an unfinished checkpoint is gone on with; a finished one is left as it is; one
of other knobs is refused. `metrics.json` is written last, so it marks a finished folder.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import imageio.v3 as iio
import torch
from torch import nn

from cbnerf.config import Config, OptimConfig, save_config
from cbnerf.data.references import find_references
from cbnerf.data.renders import Renders, save_renders
from cbnerf.data.scene import Scene
from cbnerf.data.splits import split_views
from cbnerf.files import write_whole
from cbnerf.training.checkpoint import (
    Checkpoint,
    Stage,
    knobs_of_stage,
    load_checkpoint,
    save_checkpoint,
)
from cbnerf.training.evaluation import image_strip, refine_views, render_views
from cbnerf.training.field import scene_cameras, train_field
from cbnerf.training.loop import Report
from cbnerf.training.processes import process_rank
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
    """Train stage 1 and render all views; returns the last metrics, the `seconds` it took and, of
    a whole training, the number of `parameters`.

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

    return _run(config, "field", scene.name, folder, train, report, device, until)


def run_refiner(
    config: Config,
    scene: Scene,
    renders: Renders,
    folder: Path,
    *,
    device: torch.device,
    report: Report = ignore,
    beside: Pairs = (),
    others: Pairs = (),
    until: int | None = None,
) -> dict[str, float]:
    """Train stage 2 and write a strip (photograph | stage 1 | refined) of a validation view.

    With `beside` it is trained on those scenes, too, and validated on all (`codebook.shared`); with
    `others` on those scenes alone (protocols `unseen-scene` and `low-res-only`). With `until` it
    stops after that many steps, and a later call goes on from there.
    """

    def train(keep: Report, resume_from: Path | None) -> nn.Module:
        refiner = train_refiner(
            config, scene, renders, device=device, report=keep, resume_from=resume_from,
            beside=beside, others=others, until=until,
        )  # fmt: skip
        if process_rank() == 0 and _is_whole(until, config.refiner.optim):
            view = (split_views(scene.num_views, config.data).val or [0])[0]
            references = find_references(config, scene, renders, [view])
            refined = refine_views(refiner, renders.rgb[[view]], device, references)[0]
            strip = image_strip([scene.images[view], renders.rgb[view], refined])
            iio.imwrite(folder / STRIP_FILE, strip.numpy())
        return refiner

    scenes = trained_on(scene, beside, others)
    return _run(config, "refiner", scenes, folder, train, report, device, until)


def read_metrics(folder: Path) -> dict[str, float] | None:
    """The metrics of a finished folder, or None."""
    file = folder / METRICS_FILE
    try:
        return json.loads(file.read_text())
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
    device: torch.device,
    until: int | None,
) -> dict[str, float]:
    finished = read_metrics(folder)
    if finished is not None:
        _check_finished(config, stage, scenes, folder)
        return finished
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CHECKPOINT_FILES[stage]
    # A folder may have been left at any of its checkpoints, at the last one, too.
    last = load_checkpoint(path, stage, device).metrics if path.exists() else {}
    before, started = last.get("seconds", 0.0), time.monotonic()

    def keep(step: int, metrics: dict[str, float], checkpoint: Checkpoint, /) -> None:
        nonlocal last
        last = metrics | {"seconds": before + time.monotonic() - started}
        if process_rank() == 0:
            save_checkpoint(checkpoint._replace(metrics=last), path)
        report(step, metrics, checkpoint)

    if process_rank() == 0 and not path.exists():
        save_config(config, folder / CONFIG_FILE)
    model = train(keep, path if path.exists() else None)
    optim = config.field.optim if stage == "field" else config.refiner.optim
    if process_rank() == 0 and _is_whole(until, optim):
        last = last | {
            "seconds": before + time.monotonic() - started,  # with what `train` renders
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        write_whole(folder / METRICS_FILE, json.dumps(last, indent=1))
    return last


def _is_whole(until: int | None, optim: OptimConfig) -> bool:
    return until is None or until >= optim.steps


def _check_finished(config: Config, stage: Stage, scenes: str, folder: Path) -> None:
    checkpoint = load_checkpoint(folder / CHECKPOINT_FILES[stage], stage, torch.device("cpu"))
    before, now = (knobs_of_stage(c, stage) for c in (checkpoint.config, config))
    if checkpoint.scene != scenes:
        other = f"the scene {checkpoint.scene}, not {scenes}"
    elif before != now:
        other = "other knobs"
    else:
        return
    raise ValueError(f"{folder}: finished with {other}; choose another folder or remove it")

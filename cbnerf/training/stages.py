"""Run a stage in a folder: train, write checkpoints, then the results that the next step reads.

A complete folder is left as it is and an unfinished one is resumed from its checkpoint; a folder
of other knobs or of another scene is refused. `manifest.json` marks a complete folder.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import imageio.v3 as iio
import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from cbnerf.codebook.refiner import Refiner
from cbnerf.config import Config
from cbnerf.data.references import find_references
from cbnerf.data.renders import Renders, save_renders
from cbnerf.data.scene import Scene
from cbnerf.data.splits import split_views
from cbnerf.files import atomic_write_text
from cbnerf.nerf.model import FieldModel
from cbnerf.overrides import save_config
from cbnerf.training.checkpoint import (
    CHECKPOINT_FILES,
    Checkpoint,
    Stage,
    is_trained_with,
    load_checkpoint,
    save_checkpoint,
)
from cbnerf.training.distributed import from_rank_0, process_rank
from cbnerf.training.evaluation import image_strip, refine_views, render_views
from cbnerf.training.field import train_field
from cbnerf.training.loop import Report
from cbnerf.training.memory import begin_peak, gpu_peak
from cbnerf.training.refiner import Pairs, train_refiner, trained_on
from cbnerf.training.store import MANIFEST, write_manifest

RENDERS_FILE, STRIP_FILE = "renders.npz", "strip.png"
METRICS_FILE, CONFIG_FILE = "metrics.json", "config.yaml"
_GAP = 4
"""Pixels between the images of a strip."""

Model = TypeVar("Model", bound=nn.Module)


def ignore(step: int, metrics: dict[str, float], checkpoint: Checkpoint, /) -> None:
    """A report that does nothing."""


def run_field(
    config: Config,
    scene: Scene,
    folder: Path,
    *,
    device: torch.device,
    report: Report = ignore,
    part: int = 1,
) -> dict[str, float]:
    """Train stage 1, render all views, and write a strip (photograph | stage 1) of a validation
    view.

    Returns the last metrics, `steps`, `seconds`, `parameters` and, on a GPU, `gpu_bytes`.

    With `part` it stops after the first 1/`part` of the steps, and a later call resumes there.
    """

    def train(keep: Report, resume_from: Path | None) -> FieldModel:
        return train_field(
            config, scene, device=device, report=keep, resume_from=resume_from, part=part
        )

    def write_results(model: FieldModel) -> None:
        cameras, views = scene.cameras(device), list(range(scene.num_views))
        renders = render_views(model, cameras, views, scene.scale)
        save_renders(renders, folder / RENDERS_FILE)
        view = shown_view(config, scene.num_views)
        _write_strip([scene.images[view], renders.rgb[view]], folder / STRIP_FILE)

    return _run(config, "field", scene.name, folder, report, part, train, write_results)


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
    part: int = 1,
) -> dict[str, float]:
    """Train stage 2 and write a strip (photograph | stage 1 | refined) of a validation view of the
    scene and of each joint one.

    The refiner is trained and validated on `scene` and the `joint` scenes (`codebook.shared`), or
    trained on the `sources` alone (protocols `unseen-scene` and `low-res-only`). With `part` it
    stops after the first 1/`part` of the steps, and a later call resumes there. Returns as
    `run_field`.
    """

    def train(keep: Report, resume_from: Path | None) -> Refiner:
        return train_refiner(
            config, scene, renders, device=device, report=keep, resume_from=resume_from,
            joint=joint, sources=sources, part=part,
        )  # fmt: skip

    def write_results(refiner: Refiner) -> None:
        for number, (own, before) in enumerate([(scene, renders), *joint]):
            view = shown_view(config, own.num_views)
            references = find_references(config, own, before, [view])
            refined = refine_views(refiner, before.of([view]), device, references)[0]
            images = [own.images[view], before.rgb[view], refined]
            _write_strip(images, folder / strip_file(number))

    scenes = trained_on(scene, joint, sources)
    return _run(config, "refiner", scenes, folder, report, part, train, write_results)


def shown_view(config: Config, num_views: int) -> int:
    """The view of a strip: the first validation view, or view 0 without one."""
    return (split_views(num_views, config.data).val or [0])[0]


def strip_file(number: int) -> str:
    """The file name of the strip of a joint scene, counted from 0."""
    return f"{Path(STRIP_FILE).stem}-{number}.png" if number else STRIP_FILE


def read_strip(file: Path, num_images: int) -> list[UInt8[Tensor, "height width 3"]] | None:
    """The images of a strip that a stage has written; None if there is none."""
    try:
        strip = torch.from_numpy(iio.imread(file))
    except FileNotFoundError:
        return None
    width = (strip.shape[1] - (num_images - 1) * _GAP) // num_images
    return [strip[:, left : left + width] for left in range(0, strip.shape[1], width + _GAP)]


def read_metrics(folder: Path) -> dict[str, float] | None:
    """The metrics of a finished folder, or None."""
    file = folder / METRICS_FILE
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise ValueError(f"{file}: damaged; remove its folder to train again") from None


def _write_strip(images: list[UInt8[Tensor, "height width 3"]], file: Path) -> None:
    iio.imwrite(file, image_strip(images, _GAP).numpy())


def _run(
    config: Config,
    stage: Stage,
    scenes: str,
    folder: Path,
    report: Report,
    part: int,
    train: Callable[[Report, Path | None], Model],
    write_results: Callable[[Model], None],
) -> dict[str, float]:
    finished, begun = from_rank_0(lambda: _open(config, stage, scenes, folder))
    if finished is not None:
        return finished
    path = folder / CHECKPOINT_FILES[stage]
    last, started = begun, time.monotonic() - (begun.metrics.get("seconds", 0.0) if begun else 0.0)

    def keep(step: int, metrics: dict[str, float], checkpoint: Checkpoint, /) -> None:
        nonlocal last
        spent = {"steps": float(step), "seconds": time.monotonic() - started}
        last = checkpoint._replace(metrics=metrics | spent)
        if process_rank() == 0:
            save_checkpoint(last, path)
        if not checkpoint.sums:  # else the process ends between evaluations
            report(step, metrics, checkpoint)

    begin_peak()
    model = train(keep, path if begun else None)
    assert last is not None  # every training reports its last step
    if process_rank() != 0 or part > 1:
        return last.metrics
    write_results(model)
    metrics = last.metrics | {
        "seconds": time.monotonic() - started,  # including the results
        "parameters": float(sum(parameter.numel() for parameter in model.parameters())),
        **gpu_peak(),
    }
    atomic_write_text(folder / METRICS_FILE, json.dumps(metrics, indent=1))
    write_manifest(folder, last.precision)
    return metrics


def _open(
    config: Config, stage: Stage, scenes: str, folder: Path
) -> tuple[dict[str, float] | None, Checkpoint | None]:
    """The metrics of a finished folder, or the checkpoint, without tensors, of an unfinished one.

    A new folder is made and given its configuration.
    """
    path = folder / CHECKPOINT_FILES[stage]
    is_finished = (folder / MANIFEST).exists()
    if not is_finished and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / CONFIG_FILE)
        return None, None
    checkpoint = load_checkpoint(path, stage, torch.device("cpu"), mmap=True)
    if not is_finished:  # perhaps after the last step
        return None, checkpoint._replace(model={}, optimizer={}, cameras={})
    if checkpoint.scene != scenes:
        other = f"the scene {checkpoint.scene}, not {scenes}"
    elif not is_trained_with(checkpoint, config):
        other = "other knobs"
    else:
        return read_metrics(folder), None
    raise ValueError(f"{folder}: finished with {other}; choose another folder or remove it")

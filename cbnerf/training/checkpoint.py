"""Checkpoints: plain tensors and values in atomic writes; reading one never runs code."""

import errno
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from cbnerf.config import Config, flatten, flatten_field
from cbnerf.files import atomic_write
from cbnerf.nerf.model import Precision
from cbnerf.overrides import with_overrides

Stage = Literal["field", "refiner"]

FIELD_FILE, REFINER_FILE = "field.pt", "refiner.pt"
CHECKPOINT_FILES: dict[Stage, str] = {"field": FIELD_FILE, "refiner": REFINER_FILE}
STAGE_NAMES: dict[Stage, str] = {"field": "stage 1", "refiner": "stage 2"}


class Checkpoint(NamedTuple):
    """A stage in training: all that an exact resume needs, and to rebuild the model."""

    stage: Stage
    scene: str
    step: int
    config: Config
    precision: Precision
    """In which the networks multiplied matrices in training."""
    model: dict[str, Any]
    """State dict of the network."""
    optimizer: dict[str, Any]
    """State dict of Adam."""
    cameras: dict[str, Any]
    """Cameras of the scene as plain values; empty for a refiner."""
    metrics: dict[str, float] = {}
    """Of the evaluation at this step."""
    sums: dict[str, Any] = {}
    """Sums of the losses since the last evaluation; empty at an evaluation."""
    num_summed: int = 0
    """Number of steps in `sums`."""


def knobs_of_stage(config: Config, stage: Stage) -> Config:
    """The configuration with every knob that does not affect the stage at its default."""
    if stage == "refiner":
        return config
    return with_overrides(Config(), flatten_field(config))


def is_trained_with(checkpoint: Checkpoint, config: Config) -> bool:
    """Whether a stage was trained with these knobs; `auto` matches any precision."""
    before, now = (knobs_of_stage(c, checkpoint.stage) for c in (checkpoint.config, config))
    if checkpoint.stage == "field":
        settled = {"field.precision": checkpoint.precision}
        before = with_overrides(before, settled)
        if now.field.precision == "auto":
            now = with_overrides(now, settled)
    return before == now


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint, or replace it; a reader never sees half a file."""
    content = checkpoint._asdict() | {"config": flatten(checkpoint.config)}
    with atomic_write(path) as file:
        torch.save(content, file)


def save_weights(path: Path, stage: Stage, target: Path) -> None:
    """Copy a checkpoint without the state of its optimizer: enough to load the model."""
    # Memory-mapped, so that the state of the optimizer is never read.
    checkpoint = load_checkpoint(path, stage, torch.device("cpu"), mmap=True)
    save_checkpoint(checkpoint._replace(optimizer={}), target)


def load_checkpoint(
    path: Path, stage: Stage, device: torch.device, *, mmap: bool = False
) -> Checkpoint:
    """Read a checkpoint of a stage; with `mmap` its tensors are read when they are used.

    ValueError where the file is missing, damaged, of the other stage or of another version.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint") from None
    except Exception as error:  # a broken pickle can raise anything
        # A damaged file also makes torch look at places that are not in it.
        trouble = isinstance(error, OSError) and error.errno != errno.EINVAL
        if trouble or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"{path}: not a checkpoint of cbnerf, or a damaged one") from None
    if not isinstance(content, dict) or not {"stage", "scene", "config"} <= set(content):
        raise ValueError(f"{path}: not a checkpoint of cbnerf")
    different = ", ".join(sorted(set(content) ^ set(Checkpoint._fields)))
    if different:
        raise ValueError(f"{path}: written by another version of cbnerf ({different})")
    if content["stage"] != stage:
        raise ValueError(f"{path}: holds a {content['stage']}, expected a {stage}")
    try:
        content["config"] = with_overrides(Config(), content["config"])
    except ValueError as error:
        raise ValueError(f"{path}: written by another version of cbnerf ({error})") from None
    return Checkpoint(**content)

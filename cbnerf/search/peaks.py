"""GPU memory of a training, from the peaks of earlier ones in the storage."""

import json
from collections.abc import Iterator
from pathlib import Path

from cbnerf.config import Config
from cbnerf.overrides import load_config, with_overrides
from cbnerf.search.estimate import largest
from cbnerf.search.plan import Plan
from cbnerf.search.sizes import needs_as_much
from cbnerf.training.checkpoint import CHECKPOINT_FILES, STAGE_NAMES, Stage
from cbnerf.training.memory import PEAK
from cbnerf.training.stages import CONFIG_FILE, METRICS_FILE

_FOLDERS = ("cache/*", "studies/*/trials/*/*")
"""Where stages are trained in a storage."""


def describe_memory(plan: Plan) -> list[str]:
    """Lines on the GPU memory that the largest configuration of a study needs, a line for each
    stage of which comparable trainings were measured."""
    return [line for stage in CHECKPOINT_FILES if (line := _describe(plan, stage))]


def _describe(plan: Plan, stage: Stage) -> str | None:
    config = largest(plan)
    peaks = [(o, peak) for o, peak in _peaks(plan.storage, stage) if o.data == config.data]
    smaller = [peak for other, peak in peaks if needs_as_much(_alike(config, other), other)]
    larger = [peak for other, peak in peaks if needs_as_much(other, _alike(config, other))]
    bounds = [f"at least {max(smaller) / 1e9:.1f} GB"] if smaller else []
    bounds += [f"at most {min(larger) / 1e9:.1f} GB"] if larger else []
    if not bounds:
        return None
    return (
        f"memory     {STAGE_NAMES[stage]} takes {', '.join(bounds)} of a GPU with the largest "
        f"values of the space (measured peaks of {len(smaller) + len(larger)} earlier trainings)"
    )


def _peaks(storage: Path, stage: Stage) -> Iterator[tuple[Config, float]]:
    """Configuration and peak in bytes of each measured training of a stage."""
    for place in _FOLDERS:
        for file in storage.glob(f"{place}/{METRICS_FILE}"):
            peak = json.loads(file.read_text(encoding="utf-8")).get(PEAK)
            if peak is not None and (file.parent / CHECKPOINT_FILES[stage]).exists():
                yield load_config(file.parent / CONFIG_FILE), peak


def _alike(config: Config, other: Config) -> Config:
    """The configuration, with `field.precision: auto` as the other one has settled it."""
    if config.field.precision != "auto":
        return config
    return with_overrides(config, {"field.precision": other.field.precision})

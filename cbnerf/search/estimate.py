"""Estimates of the time and the GPU memory of a study, from a few steps on this machine."""

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch

from cbnerf.codebook.refiner import Refiner
from cbnerf.config import Config, KnobError
from cbnerf.data.captures import find_photographs
from cbnerf.data.references import find_references
from cbnerf.data.renders import Renders
from cbnerf.data.scene import Scene
from cbnerf.data.splits import split_views
from cbnerf.nerf.model import FieldModel
from cbnerf.overrides import with_overrides
from cbnerf.search.machines import num_slots
from cbnerf.search.plan import Plan
from cbnerf.search.spec import Choices, Range
from cbnerf.training.checkpoint import Checkpoint, Stage
from cbnerf.training.distributed import choose_device
from cbnerf.training.evaluation import refine_views, render_views
from cbnerf.training.field import train_field
from cbnerf.training.loop import Report, num_steps
from cbnerf.training.memory import gpu_share
from cbnerf.training.models import count_parameters
from cbnerf.training.refiner import train_refiner
from cbnerf.training.stages import ignore

_STEPS = 15
"""Training steps that are timed."""
_HEADROOM = 1.2
"""Factor on the measured GPU memory, for later steps."""
_MAX_PROCESSES_PER_GPU = 4
"""More processes on one GPU slow each other down."""
_FIELD_BYTES = 400
"""Bytes of a checkpoint of the planes field per image pixel."""

Trained = TypeVar("Trained")


class Estimate(NamedTuple):
    """Seconds of one training run, without start-up."""

    field_seconds: float
    refiner_seconds: float

    def unit_seconds(self, plan: Plan) -> float:
        """A full training of a configuration on one scene (or on the joint scenes)."""
        if plan.stage == "field":
            return self.field_seconds
        num_fields = 0 if plan.shares_fields else len(plan.scenes) / len(plan.trainings)
        return self.refiner_seconds + num_fields * self.field_seconds

    def wall_seconds(self, plan: Plan, slots: int) -> float:
        """The whole study with `slots` training runs at a time, if no configuration is pruned."""
        num_fields = len(plan.scenes) if plan.shares_fields else 0
        num_units = plan.spec.trials * len(plan.trainings)
        stage_1 = math.ceil(num_fields / slots) * self.field_seconds
        return stage_1 + math.ceil(num_units / slots) * self.unit_seconds(plan)


def describe_price(plan: Plan) -> list[str]:
    """The estimated cost of a study as lines of text, calibrated on its first scene."""
    device = choose_device()
    scene = plan.load_scene(plan.scenes[0], plan.base.data)
    num_together = len(plan.scenes) // len(plan.trainings)
    estimate = calibrate(plan.base, scene, device, num_together=num_together, num_rungs=plan.rungs)
    lines = [
        f"estimate   {estimate.field_seconds:.1f} s for a field, "
        f"{estimate.refiner_seconds:.1f} s for a refiner (calibrated on {scene.name}, {device})"
    ]
    if plan.spec.stopping.rule != "none":
        lines.append(f"           before {plan.spec.stopping.rule} prunes anything:")
    slots, gpus = num_slots(plan), plan.gpus_per_worker * plan.spec.resources.max_workers
    places = [(f"with {count} {'GPUs' if gpus else 'runs at a time'}",
               int(count / gpus) if gpus else count) for count in (1, 4, 8)]  # fmt: skip
    for where, runs in [*places, (f"on this machine, {slots} runs at a time", slots)]:
        if runs:
            lines.append(f"           {estimate.wall_seconds(plan, runs) / 60:8.1f} min {where}")
    hours = estimate.wall_seconds(plan, 1) / 3600 * (gpus or 1)
    lines.append(f"           {hours:8.2f} {'GPU-hours' if gpus else 'hours'} in all")
    if gpus and device.type == "cpu":
        lines.append("           timed without a GPU; with one it takes less time")
    return lines


def bytes_needed(plan: Plan, views: dict[str, int]) -> int:
    """Disk space of a study: renders of all views, a checkpoint of each training, and as much again
    for MLflow's copies."""
    image = plan.base.data.width**2 * 3 // 4
    field = _FIELD_BYTES * image + 20_000_000
    fields = plan.spec.trials * len(plan.scenes) if not plan.shares_fields else len(plan.scenes)
    size = fields * field + sum(views.values()) * image * 9
    if plan.stage == "refiner":  # weights and both averages of Adam
        size += plan.spec.trials * len(plan.trainings) * count_parameters(plan.base) * 12
    return 2 * size


def calibrate(
    config: Config,
    scene: Scene,
    device: torch.device,
    *,
    num_together: int = 1,
    num_rungs: int = 1,
) -> Estimate:
    """Time a few steps of both stages and one view of each, and extrapolate.

    The refiner is assumed to train on `num_together` joint scenes like this one, and to be
    evaluated at the end of each rung in addition.
    """
    num_val = len(split_views(scene.num_views, config.data).val)
    steps = num_steps(config, "field", [scene])
    num_renders = scene.num_views + config.field.optim.evaluations * num_val
    fixed, step, model = _time(lambda report: _try_field(config, scene, device, report))
    cameras = scene.cameras(device)
    render = _seconds(lambda: render_views(model, cameras, [0], scene.scale))
    field_seconds = fixed + steps * step + num_renders * render
    if config.refiner.kind == "none":
        return Estimate(field_seconds, 0)
    steps = num_steps(config, "refiner", [scene] * num_together)
    num_refined = (config.refiner.optim.evaluations + num_rungs - 1) * num_val * num_together
    fixed, step, refiner = _time(
        lambda report: _try_refiner(config, scene, device, report, num_together)
    )
    view = _photographs_as_renders(scene).of([0])
    references = find_references(config, scene, view, [0])
    refine = _seconds(lambda: refine_views(refiner, view, device, references))
    return Estimate(field_seconds, fixed + steps * step + num_refined * refine)


def measure_share(plan: Plan, stages: Sequence[Stage]) -> float | None:
    """The share of this machine's GPU that training these stages needs, with the largest values
    of the space and on the scene with the most views; None without a GPU."""
    device, width = choose_device(), plan.base.data.width
    if gpu_share() is None:
        return None
    scenes = plan.scenes
    if plan.data:
        folders = {name: plan.scene_folder(name, width) for name in scenes}
        scenes = sorted(scenes, key=lambda s: len(find_photographs(folders[s], width).files))
    scene = plan.load_scene(scenes[-1], plan.base.data)
    config = largest(plan)
    if "field" in stages:
        _try_field(config, scene, device, ignore)
    if "refiner" in stages:
        _try_refiner(config, scene, device, ignore, len(plan.scenes) // len(plan.trainings))
    return gpu_share()


def largest(plan: Plan) -> Config:
    """The base configuration with the largest value of each numeric knob of the space; without
    them if these are incompatible."""
    tops = {
        name: max(domain.choices) if isinstance(domain, Choices) else domain.high
        for name, domain in plan.spec.space.items()
        if isinstance(domain, Range) or not any(isinstance(v, str) for v in domain.choices)
    }
    try:
        return with_overrides(plan.base, tops)
    except KnobError:
        return plan.base


def part_of_gpu(share: float) -> float:
    """The part of a GPU that Ray reserves for a process that needs this share: one of at most four
    equal parts, with headroom for later steps."""
    return 1 / min(max(int(1 / (share * _HEADROOM)), 1), _MAX_PROCESSES_PER_GPU)


def _try_field(config: Config, scene: Scene, device: torch.device, report: Report) -> FieldModel:
    return train_field(_shortened(config, "field"), scene, device=device, report=report)


def _try_refiner(
    config: Config, scene: Scene, device: torch.device, report: Report, num_together: int
) -> Refiner:
    """Train on copies of the scene as joint scenes."""
    pair, short = (scene, _photographs_as_renders(scene)), _shortened(config, "refiner")
    joint = [pair] * (num_together - 1)
    return train_refiner(short, *pair, device=device, report=report, joint=joint)


def _photographs_as_renders(scene: Scene) -> Renders:
    """The photographs in place of stage-1 renders, which do not exist yet."""
    return Renders(scene.images, torch.zeros(scene.images.shape, dtype=torch.float16))


def _shortened(config: Config, stage: Stage) -> Config:
    """The configuration with few steps, three reports and no validation views."""
    short = {f"{stage}.optim.steps": _STEPS, f"{stage}.optim.evaluations": 3}
    return with_overrides(config, short | {"data.validation": False})


def _time(train: Callable[[Report], Trained]) -> tuple[float, float, Trained]:
    """Seconds before the first step and of a step, from the times of the reports, and the trained
    model; a model that is solved without steps reports once."""
    started, seconds = time.perf_counter(), {}

    def note(step: int, metrics: dict[str, float], checkpoint: Checkpoint, /) -> None:
        seconds[step] = time.perf_counter() - started

    model = train(note)
    (first, early), (last, late) = list(seconds.items())[0], list(seconds.items())[-1]
    per_step = (late - early) / max(last - first, 1)
    return max(early - first * per_step, 0), per_step, model


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started

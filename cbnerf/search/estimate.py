"""What a study will cost, in time and GPU memory, from a few steps on the machine at hand."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from cbnerf.config import Config, KnobError, OptimConfig
from cbnerf.data.llff import find_photographs
from cbnerf.data.renders import Renders
from cbnerf.data.scene import Scene
from cbnerf.data.splits import split_views
from cbnerf.overrides import with_overrides
from cbnerf.search.plan import Plan
from cbnerf.search.spec import Choices, Range
from cbnerf.training.checkpoint import Stage
from cbnerf.training.distributed import choose_device
from cbnerf.training.evaluation import render_views
from cbnerf.training.field import train_field
from cbnerf.training.memory import gpu_share
from cbnerf.training.refiner import train_refiner
from cbnerf.training.stages import ignore

_SHORT, _LONG = 3, 15
_HEADROOM = 1.2
_MOST_PARTS = 4
"""More processes than this on one GPU wait for each other."""


class Estimate(NamedTuple):
    """Seconds of one training run, start-up apart."""

    field_seconds: float
    refiner_seconds: float

    def unit_seconds(self, plan: Plan) -> float:
        """One training of a configuration to its end."""
        if plan.stage == "field":
            return self.field_seconds
        num_fields = 0 if plan.shares_fields else len(plan.scenes) / len(plan.trainings)
        return self.refiner_seconds + num_fields * self.field_seconds

    def wall_seconds(self, plan: Plan, slots: int) -> float:
        """The whole study with `slots` training runs at a time, if no configuration is stopped."""
        stage_1 = -(-len(plan.scenes) // slots) * self.field_seconds if plan.shares_fields else 0
        num_trainings = plan.spec.trials * len(plan.trainings)
        return stage_1 + -(-num_trainings // slots) * self.unit_seconds(plan)

    def run_hours(self, plan: Plan) -> float:
        """Hours of all training runs together."""
        return self.wall_seconds(plan, 1) / 3600


def calibrate(
    config: Config,
    scene: Scene,
    device: torch.device,
    *,
    num_together: int = 1,
    num_rungs: int = 1,
) -> Estimate:
    """Time a few steps of both stages and one render, and scale up; as many scenes like this one
    as are `num_together` share a refiner, which is evaluated at the end of each rung, too."""

    def field(steps: int) -> None:
        _try_field(config, scene, device, steps)

    def refiner(steps: int) -> None:
        _try_refiner(config, scene, device, steps, num_together)

    one_step = with_overrides(
        _shortened(config, "field", 1), {"data.validation": False, "field.optim.batch_size": 64}
    )
    model = train_field(one_step, scene, device=device, report=ignore)
    cameras = scene.cameras(device)
    render = _seconds(lambda: render_views(model, cameras, [0], scene.scale))
    num_val = len(split_views(scene.num_views, config.data).val)
    num_renders = scene.num_views + config.field.optim.evaluations * num_val
    return Estimate(
        field_seconds=_total(field, config.field.optim) + num_renders * render,
        refiner_seconds=(
            0
            if config.refiner.kind == "none"
            else _total(refiner, config.refiner.optim, num_rungs - 1)
        ),
    )


def measure_share(plan: Plan, stages: Sequence[Stage]) -> float | None:
    """The part of this machine's GPU that a training of some stages needs, with the largest values
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
        _try_field(config, scene, device, _SHORT)
    if "refiner" in stages:
        _try_refiner(config, scene, device, _SHORT, len(plan.scenes) // len(plan.trainings))
    return gpu_share()


def largest(plan: Plan) -> Config:
    """The base with the largest value of each number of the space; the base itself where these do
    not go together."""
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
    """The GPU that Ray gives a process which needs this share: one of equal parts, four at most,
    with room for what a few steps do not show."""
    return 1 / min(max(int(1 / (share * _HEADROOM)), 1), _MOST_PARTS)


def _try_field(config: Config, scene: Scene, device: torch.device, steps: int) -> None:
    short = _shortened(config, "field", steps)
    train_field(short, scene, device=device, report=ignore)


def _try_refiner(
    config: Config, scene: Scene, device: torch.device, steps: int, num_together: int
) -> None:
    """Train on photographs in place of renders; the scene stands in for its joint scenes."""
    pair = scene, Renders(scene.images, torch.zeros(scene.images.shape[:3], dtype=torch.float16))
    short = _shortened(config, "refiner", steps)
    joint = [pair] * (num_together - 1)
    train_refiner(short, *pair, device=device, report=ignore, joint=joint)


def _shortened(config: Config, stage: str, steps: int) -> Config:
    return with_overrides(config, {f"{stage}.optim.steps": steps, f"{stage}.optim.evaluations": 1})


def _total(train: Callable[[int], None], optim: OptimConfig, more_evaluations: int = 0) -> float:
    """Seconds of a whole run: the slope between two short runs gives a step, the rest is fixed."""
    train(1)
    short, long = _seconds(lambda: train(_SHORT)), _seconds(lambda: train(_LONG))
    per_step = max(long - short, 0) / (_LONG - _SHORT)
    fixed = max(short - _SHORT * per_step, 0)
    return fixed * (optim.evaluations + more_evaluations) + per_step * optim.steps


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started

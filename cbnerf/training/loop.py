"""The training loop of both stages: step, learning rate, evaluation, checkpoint, report.

It uses DistributedDataParallel if `torch.distributed` is initialised (torchrun, Ray Train).
Callers are notified through `report` only.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cbnerf.config import Config, KnobError, OptimConfig
from cbnerf.data.scene import Scene
from cbnerf.data.splits import split_views
from cbnerf.nerf.model import Precision
from cbnerf.progress import progress
from cbnerf.rng import Rng
from cbnerf.training.checkpoint import (
    STAGE_NAMES,
    Checkpoint,
    Stage,
    is_trained_with,
    load_checkpoint,
)
from cbnerf.training.distributed import any_process, from_rank_0, num_processes, process_rank
from cbnerf.training.preemption import Preempted, is_announced, is_noticed, postponed

Report = Callable[[int, dict[str, float], Checkpoint], None]
"""Called with (step, metrics, checkpoint) on every process after every evaluation; metrics are
those of rank 0. A process that must end calls it between evaluations, without metrics; its
checkpoint then has `sums`."""

_STEPS_TO_AGREE = 8
"""After so many steps processes tell each other whether one of them must end."""
_STEPS_TO_ASK = 64
"""After so many steps they ask whether a machine goes soon, which takes some milliseconds."""

Parameters = ParamSpec("Parameters")
Trained = TypeVar("Trained")


class Losses(NamedTuple):
    total: Tensor
    parts: dict[str, Tensor]
    """Scalars to log, by metric name."""


DrawLosses = Callable[[nn.Module, int, Rng], Losses]
"""From the (wrapped) model, this process's batch size and the step's random numbers."""


class Task(NamedTuple):
    """A stage, as the loop trains it."""

    stage: Stage
    scene: str
    config: Config
    precision: Precision
    """Of the networks' matrix products."""
    optim: OptimConfig
    steps: int
    model: nn.Module
    param_groups: list[dict[str, Any]]
    """Groups for Adam, each with its own `lr`."""
    losses: DrawLosses
    evaluate: Callable[[], dict[str, float]]
    cameras: dict[str, Any]
    check: Callable[[], None] = lambda: None
    """Called on every process before an evaluation; raises FloatingPointError where the training
    has diverged."""


def fit(
    task: Task,
    *,
    device: torch.device,
    report: Report,
    resume_from: Path | None,
    part: int = 1,
) -> None:
    """Train `task.model` in place for `task.steps` steps, or for the first 1/`part` of them.

    A training that stops early also reports there; resumed from that checkpoint it ends with the
    same bits as one that never stopped. At SIGTERM (`leaving_at_sigterm`, `note_sigterm`) it
    reports the checkpoint of its last step without an evaluation, and raises `Preempted`.
    """
    rank, world_size = process_rank(), num_processes()
    optim = task.optim
    if optim.batch_size % world_size:
        raise KnobError(
            f"{task.stage}.optim.batch_size = {optim.batch_size} is not divisible by "
            f"{world_size} processes"
        )
    optimizer = torch.optim.Adam(task.param_groups, fused=True)
    so_far = _resume(task, optimizer, resume_from, device) if resume_from else _Progress()
    model: nn.Module = task.model.train()
    if world_size > 1:
        model = DistributedDataParallel(task.model)
    base_rates = [group["lr"] for group in task.param_groups]
    last_step = max(task.steps // part, 1)
    label = f"{STAGE_NAMES[task.stage]} of {task.scene}"

    def train_step(step: int) -> None:
        rng = Rng(task.config.seed, step, device, rank=rank, world_size=world_size)
        for group, base in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = base * learning_rate_factor(step, task.steps, optim)
        with _tf32(task, device):
            losses = task.losses(model, optim.batch_size // world_size, rng)
            optimizer.zero_grad(set_to_none=True)
            losses.total.backward()
            optimizer.step()
        so_far.add(losses.parts)

    def report_now(metrics: dict[str, float]) -> None:
        report(so_far.step, metrics, _checkpoint(task, optimizer, so_far, metrics))

    def evaluate_if_due() -> None:
        is_due = is_evaluation_step(so_far.step, task.steps, optim.evaluations)
        if so_far.num_summed and (is_due or so_far.step == last_step):
            averages = so_far.averages()
            _check_finite(averages, task.stage, so_far.step)
            task.check()
            metrics = averages | _evaluate(task) if rank == 0 else {}
            so_far.clear()
            report_now(metrics)

    all_end = False
    try:
        evaluate_if_due()  # if it was preempted before it could
        for step in progress(range(so_far.step, last_step), label):
            with postponed():
                train_step(step)
            if all_end := _must_end(so_far.step, device):
                raise Preempted
            evaluate_if_due()
    except Preempted:
        with postponed():
            if so_far.num_summed:
                report_now({})
            if all_end:
                from_rank_0(lambda: None)  # Ray ends a group with its first process.
        raise
    task.model.eval()


def deterministic_if_configured(
    train: Callable[Concatenate[Config, Parameters], Trained],
) -> Callable[Concatenate[Config, Parameters], Trained]:
    """Enable deterministic algorithms during the training if `config.deterministic`."""

    @wraps(train)
    def run(config: Config, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Trained:
        before = torch.are_deterministic_algorithms_enabled()
        if config.deterministic:
            # Read by cuBLAS at its start; without it torch refuses matrix products.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(before or config.deterministic)
        try:
            return train(config, *args, **kwargs)
        finally:
            torch.use_deterministic_algorithms(before)

    return run


@contextmanager
def _tf32(task: Task, device: torch.device) -> Iterator[None]:
    """Allow TF32 in float32 matrix products on CUDA, in the steps of stage 2.

    Stage 1 needs float32: its rays and sums along them are matrix products, too. So do the solution
    of filters and the scoring of images.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda" and task.stage == "refiner" and not task.config.deterministic:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def num_steps(config: Config, stage: Stage, scenes: Iterable[Scene]) -> int:
    """Steps of a training on the training views of some scenes."""
    num_pixels = sum(
        len(split_views(scene.num_views, config.data).train) * scene.height * scene.width
        for scene in scenes
    )
    return config.num_steps(stage, num_pixels)


def learning_rate_factor(step: int, steps: int, optim: OptimConfig) -> float:
    """Linear warm-up times cosine decay, as a share of the base rate."""
    warmup = min(1.0, (step + 1) / max(optim.warmup_steps, 1))
    cosine = (1 + math.cos(math.pi * step / steps)) / 2
    return warmup * (optim.lr_end + (1 - optim.lr_end) * cosine)


def is_evaluation_step(done: int, steps: int, evaluations: int) -> bool:
    """Whether to evaluate after `done` of all steps: evenly spaced, the last time at the end."""
    return done * evaluations // steps > (done - 1) * evaluations // steps


@dataclass
class _Progress:
    """How far a training is."""

    step: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Sums of the losses since the last evaluation."""
    num_summed: int = 0

    def add(self, parts: dict[str, Tensor]) -> None:
        for name, value in parts.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.step += 1
        self.num_summed += 1

    def averages(self) -> dict[str, float]:
        return {name: float(value) / self.num_summed for name, value in self.sums.items()}

    def clear(self) -> None:
        self.sums, self.num_summed = {}, 0


def _must_end(step: int, device: torch.device) -> bool:
    """Whether this process, or one that trains with it, must end; all agree on the answer."""
    if num_processes() == 1:
        return is_noticed()
    if step % _STEPS_TO_AGREE:
        return False
    goes_soon = step % _STEPS_TO_ASK == 0 and is_announced()
    return any_process(goes_soon or is_noticed(), device)


def _evaluate(task: Task) -> dict[str, float]:
    task.model.eval()
    with torch.no_grad():
        metrics = task.evaluate()
    task.model.train()
    return metrics


def _resume(
    task: Task, optimizer: torch.optim.Optimizer, path: Path, device: torch.device
) -> _Progress:
    """Load the state of a checkpoint; returns how far it is."""
    # A checkpoint that is broadcast must not be on the GPU of rank 0.
    place = device if num_processes() == 1 else torch.device("cpu")
    checkpoint = from_rank_0(lambda: load_checkpoint(path, task.stage, place))
    if not is_trained_with(checkpoint, task.config) or checkpoint.scene != task.scene:
        raise ValueError(f"{path}: cannot resume, it was trained with other knobs or another scene")
    if checkpoint.precision != task.precision:
        raise ValueError(
            f"{path}: cannot resume, it was begun in {checkpoint.precision} and `auto` is "
            f"{task.precision} here; give --field.precision {checkpoint.precision}"
        )
    if not checkpoint.optimizer:
        raise ValueError(
            f"{path}: cannot resume, it holds weights alone, as MLflow's copies do; remove it to "
            "train anew"
        )
    task.model.load_state_dict(checkpoint.model)
    optimizer.load_state_dict(checkpoint.optimizer)
    sums = {name: value.to(device) for name, value in checkpoint.sums.items()}
    return _Progress(checkpoint.step, sums, checkpoint.num_summed)


def _checkpoint(
    task: Task, optimizer: torch.optim.Optimizer, so_far: _Progress, metrics: dict[str, float]
) -> Checkpoint:
    return Checkpoint(
        stage=task.stage,
        scene=task.scene,
        step=so_far.step,
        config=task.config,
        precision=task.precision,
        model=task.model.state_dict(),
        optimizer=optimizer.state_dict(),
        cameras=task.cameras,
        metrics=metrics,
        sums=so_far.sums,
        num_summed=so_far.num_summed,
    )


def _check_finite(metrics: dict[str, float], stage: str, step: int) -> None:
    broken = [name for name, value in metrics.items() if not math.isfinite(value)]
    if broken:
        raise FloatingPointError(f"{stage}: {', '.join(broken)} not finite within {step} steps")

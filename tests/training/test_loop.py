import itertools
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_two_ranks
from torch import nn

from cbnerf.config import Config, OptimConfig
from cbnerf.data.scene import Scene
from cbnerf.data.splits import split_views
from cbnerf.overrides import with_overrides
from cbnerf.presets import preset
from cbnerf.rng import Rng
from cbnerf.training import loop
from cbnerf.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cbnerf.training.loop import (
    Losses,
    Task,
    fit,
    is_evaluation_step,
    learning_rate_factor,
    num_steps,
)
from cbnerf.training.preemption import Preempted, is_noticed, leaving_at_sigterm

CPU = torch.device("cpu")


def optim_config(steps: int, lr: float, **knobs) -> OptimConfig:
    return OptimConfig(passes=1.0, steps=steps, batch_size=4, lr=lr, **knobs)


def make_task(optim: OptimConfig, **changes) -> Task:
    """Fits a constant to noise around 3."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)

    def losses(wrapped: nn.Module, batch_size: int, rng: Rng) -> Losses:
        error = wrapped(torch.ones(batch_size, 1)) - 3 - 0.1 * rng.normal(batch_size, 1)
        total = error.square().mean()
        return Losses(total, {"train/loss": total})

    task = Task(
        stage="field", scene="line", config=Config(), optim=optim, steps=optim.steps,
        model=model, losses=losses,
        param_groups=[{"params": list(model.parameters()), "lr": optim.lr}],
        evaluate=lambda: {"val/weight": model.weight.item(), "val/training": model.training},
        cameras={}, precision="float32",
    )  # fmt: skip
    return task._replace(**changes)


def run(task: Task, resume_from: Path | None = None) -> list[tuple[int, dict[str, float]]]:
    reports = []
    fit(
        task,
        device=CPU,
        report=lambda step, metrics, _: reports.append((step, metrics)),
        resume_from=resume_from,
    )
    return reports


def test_learning_rate_in_closed_form():
    optim = optim_config(100, 1.0, lr_end=0.1, warmup_steps=10)
    for step in range(100):
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 100))
        factor = min((step + 1) / 10, 1) * cosine
        assert learning_rate_factor(step, 100, optim) == pytest.approx(factor)
    constant = optim_config(100, 1.0, lr_end=1.0, warmup_steps=0)
    assert {learning_rate_factor(step, 100, constant) for step in range(100)} == {1.0}


def test_the_optimiser_follows_the_learning_rate():
    # The first steps of Adam have the size of the learning rate, whatever the gradient.
    optim = optim_config(3, 1e-3, warmup_steps=3, lr_end=1.0, evaluations=3)
    weights = [metrics["val/weight"] for _, metrics in run(make_task(optim))]
    moves = [after - before for before, after in zip([0.0, *weights], weights, strict=False)]
    assert moves == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3], rel=0.01)


@pytest.mark.parametrize("steps, evaluations", [(100, 4), (10, 3), (7, 7), (3, 8), (1, 1)])
def test_evaluations_are_even_and_the_last_is_at_the_end(steps: int, evaluations: int):
    done = [step for step in range(1, steps + 1) if is_evaluation_step(step, steps, evaluations)]
    assert len(done) == min(evaluations, steps)
    assert done[-1] == steps
    gaps = [after - before for before, after in zip([0, *done], done, strict=False)]
    assert max(gaps) - min(gaps) <= 1


def test_training_pixels_are_seen_as_often_as_passes_say(tiny_scene: Scene):
    knobs = {"passes": 3.0, "steps": 0, "batch_size": 4}
    schedule = {f"{stage}.optim.{k}": v for stage in ("field", "refiner") for k, v in knobs.items()}
    config = with_overrides(preset("cb-nerf", "tiny"), schedule | {"refiner.patch_size": 16})
    num_train = len(split_views(tiny_scene.num_views, config.data).train)
    assert num_steps(config, "field", [tiny_scene]) == 3 * num_train * (32 * 24) / 4
    assert num_steps(config, "refiner", [tiny_scene]) == 3 * num_train * (4 * 3) / 4
    assert num_steps(config, "refiner", [tiny_scene] * 2) == 2 * 3 * num_train * (4 * 3) / 4
    given = with_overrides(config, {"field.optim.steps": 7})
    assert num_steps(given, "field", [tiny_scene]) == 7


def test_reports_average_the_losses_since_the_last_one():
    optim = optim_config(6, 0.1, evaluations=6)
    each = [metrics["train/loss"] for _, metrics in run(make_task(optim))]
    halves = run(make_task(optim_config(6, 0.1, evaluations=2)))
    assert [step for step, _ in halves] == [3, 6]
    for (_, metrics), part in zip(halves, (each[:3], each[3:]), strict=True):
        assert metrics["train/loss"] == pytest.approx(sum(part) / 3)


def test_models_are_scored_in_evaluation_mode_and_left_in_it():
    task = make_task(optim_config(2, 0.1, evaluations=2))
    assert [metrics["val/training"] for _, metrics in run(task)] == [False, False]
    assert not task.model.training


def test_nan_ends_training_with_its_name():
    task = make_task(optim_config(4, 0.1, evaluations=2))

    def diverge(wrapped: nn.Module, batch_size: int, rng: Rng) -> Losses:
        total = wrapped(torch.full((batch_size, 1), torch.nan)).sum()
        return Losses(total, {"train/loss": total, "train/fine": torch.zeros(())})

    with pytest.raises(FloatingPointError, match="field: train/loss not finite within 2 steps"):
        run(task._replace(losses=diverge))


def test_a_batch_must_divide_among_the_processes(monkeypatch):
    monkeypatch.setattr(loop, "num_processes", lambda: 3)
    with pytest.raises(ValueError, match="field.optim.batch_size = 4 is not divisible by 3"):
        run(make_task(optim_config(4, 0.1)))


def save_half_way(path: Path, config: Config) -> OptimConfig:
    optim = optim_config(4, 0.1, evaluations=2)

    def keep(step, metrics, checkpoint) -> None:
        if step == 2:
            save_checkpoint(checkpoint, path)

    fit(make_task(optim, config=config), device=CPU, report=keep, resume_from=None)
    return optim


def test_weights_alone_are_not_resumed(tmp_path: Path):
    optim = optim_config(4, 0.1, evaluations=1)
    path = tmp_path / "half.pt"
    fit(
        make_task(optim), device=CPU, resume_from=None,
        report=lambda step, metrics, made: save_checkpoint(made._replace(optimizer={}), path),
    )  # fmt: skip
    with pytest.raises(ValueError, match="half.pt: cannot resume, it holds weights alone"):
        run(make_task(optim), resume_from=path)


@pytest.mark.parametrize(
    "changes, scene",
    [({"field.sub_rays": 1}, "line"), ({"data.width": 64}, "line"), ({"seed": 1}, "line"),
     ({}, "plane")],
)  # fmt: skip
def test_other_knobs_or_another_scene_are_not_resumed(changes, scene: str, tmp_path: Path):
    optim = save_half_way(tmp_path / "half.pt", Config())
    other = make_task(optim, config=with_overrides(Config(), changes), scene=scene)
    with pytest.raises(ValueError, match="half.pt: cannot resume, it was trained with other"):
        run(other, tmp_path / "half.pt")


def test_a_field_does_not_care_for_the_knobs_of_stage_two(tmp_path: Path):
    optim = save_half_way(tmp_path / "half.pt", Config())
    other = with_overrides(Config(), {"codebook.size": 7, "loss.lambda_vq": 2, "refiner.blocks": 1})
    reports = run(make_task(optim, config=other), tmp_path / "half.pt")
    assert [step for step, _ in reports] == [4]


def at_step(number: int, task: Task, what: Callable[[], object]) -> Task:
    """The task, with something that happens during a step."""

    def losses(wrapped: nn.Module, batch_size: int, rng: Rng) -> Losses:
        if next(steps) == number:
            what()
        return task.losses(wrapped, batch_size, rng)

    steps = itertools.count()
    return task._replace(losses=losses)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


Story = list[tuple[int, dict[str, float]]]


def preempted(task: Task, path: Path, resume_from: Path | None = None) -> tuple[Story, int]:
    """What a training that SIGTERM ends has reported, and the step of its checkpoint."""
    told: Story = []

    def keep(step: int, metrics: dict[str, float], made: Checkpoint, /) -> None:
        save_checkpoint(made, path)
        if not made.sums:
            told.append((step, metrics))

    with pytest.raises(Preempted), leaving_at_sigterm():
        fit(task, device=CPU, report=keep, resume_from=resume_from)
    return told, load_checkpoint(path, "field", CPU).step


@pytest.mark.parametrize("step", range(8))
def test_sigterm_loses_no_step_and_changes_no_bit(step: int, tmp_path: Path):
    optim = optim_config(8, 0.1, evaluations=2)
    whole = make_task(optim)
    undisturbed, path = run(whole), tmp_path / "left.pt"
    told, reached = preempted(at_step(step, make_task(optim), terminate), path)
    assert reached == step + 1
    rest = make_task(optim)
    assert told + run(rest, path) == undisturbed
    assert torch.equal(rest.model.weight, whole.model.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [4, 8])
def test_sigterm_in_an_evaluation_does_not_wait_for_it(step: int, tmp_path: Path):
    optim = optim_config(8, 0.1, evaluations=2)
    undisturbed, path = run(make_task(optim)), tmp_path / "left.pt"
    task, evaluations = make_task(optim), itertools.count(1)

    def evaluate() -> dict[str, float]:
        if 4 * next(evaluations) == step:
            terminate()
            pytest.fail("still here")
        return task.evaluate()

    told, reached = preempted(task._replace(evaluate=evaluate), path)
    assert reached == step
    assert told + run(make_task(optim), path) == undisturbed


def test_who_is_preempted_twice_ends_with_the_same_bits(tmp_path: Path):
    optim, path = optim_config(8, 0.1, evaluations=1), tmp_path / "left.pt"
    for first in (1, 2):
        task = at_step(first, make_task(optim), terminate)
        preempted(task, path, path if path.exists() else None)
    assert run(make_task(optim), path) == run(make_task(optim))


def leave_together(rank: int, folder: Path) -> None:
    """SIGTERM comes to rank 1 alone; both end after the same step."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    optim = optim_config(40, 0.1, evaluations=1)
    task = make_task(optim)
    if rank == 1:
        task = at_step(2, task, terminate)
    _, reached = preempted(task, folder / f"{rank}.pt")
    (folder / f"{rank}.txt").write_text(str(reached), encoding="utf-8")
    dist.destroy_process_group()


def test_processes_that_train_together_leave_together(tmp_path: Path):
    on_two_ranks(leave_together, tmp_path)
    reached = [(tmp_path / f"{rank}.txt").read_text(encoding="utf-8") for rank in (0, 1)]
    assert reached == ["8", "8"]


def test_sigterm_ends_other_work_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"), leaving_at_sigterm():
        terminate()
        pytest.fail("still here")
    with leaving_at_sigterm():
        assert not is_noticed()  # of the next one
    assert signal.getsignal(signal.SIGTERM) is before

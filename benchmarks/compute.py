"""Codes against a network without codes at equal compute: the gain of both over seconds.

    python benchmarks/compute.py --data ../shared/llff --cache runs/codebook --budgets 10 30 100

Trains stage 1 of each scene once, then `cb-nerf` and its control `cnn` for each budget and seed,
with a learning rate schedule of that length. The number of steps follows from a short training that
is timed. On a CPU with one thread, times are the process's CPU seconds, from the renders to the
last evaluation. Both have the same network, learning rate and size of patches; `SIZES` says what
differs. Prints and writes the gain in PSNR of held-out views over stage 1, and paired differences
over views with intervals of 95 % (Student's t).

Trainings are kept in the JSON file as they end: the same command resumes, and one with more budgets
or seeds trains only what is new.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import stage_1
import torch
import tyro
from clock import clock
from codebook import interval
from provenance import provenance
from trials import load_trials, save_trials

from cbnerf.config import Config
from cbnerf.data.renders import Renders
from cbnerf.data.scene import Scene
from cbnerf.data.splits import split_views
from cbnerf.overrides import with_overrides
from cbnerf.presets import preset
from cbnerf.training.distributed import choose_device
from cbnerf.training.evaluation import refine_views, score_views
from cbnerf.training.refiner import train_refiner

_NETWORK = {"refiner.channels": 32, "refiner.blocks": 8, "refiner.optim.evaluations": 1}
SIZES: dict[str, dict[str, Any]] = {
    "cb-nerf": _NETWORK | {"refiner.optim.batch_size": 8},
    "cnn": _NETWORK | {"refiner.optim.batch_size": 16},
}
"""Knobs of each method; both were chosen on validation views."""
CODES = {0: 1024, 20: 4096}
"""Codebook size from a budget in seconds on: clustering many codes takes longer."""
_TIMED = 20
"""Steps of the timed training."""


@dataclass(kw_only=True)
class Options(stage_1.Options):
    budgets: tuple[float, ...] = (10, 30, 100, 300, 1000)
    """Seconds."""
    seeds: int = 3
    views: str = "test"
    """`test`, or `val` to select on."""
    output: Path = Path("benchmarks/results/codebook")
    """Receives RESOLUTION-compute-VIEWS.md and .json."""


@dataclass
class Trial:
    method: str
    scene: str
    seed: int
    budget: float
    seconds: float
    steps: int
    psnr: list[float]
    """Gain of each view in dB."""
    ssim: list[float]
    provenance: str
    """From what code, when and where."""


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    stages = {
        name: stage_1.render_stage_1(
            _config(options, "cb-nerf", 0), options.data, name, options.cache
        )
        for name in options.scenes
    }
    kept = _file(options).with_suffix(".json")
    trials = load_trials(kept, Trial)
    places = product(options.budgets, options.scenes, SIZES)
    for budget, name, method in places:
        done = {t.seed for t in trials if (t.budget, t.scene, t.method) == (budget, name, method)}
        missing = [seed for seed in range(options.seeds) if seed not in done]
        if not missing:
            continue
        config = _config(options, method, budget)
        steps = _steps_within(budget, config, *stages[name])
        for seed in missing:
            own = {"seed": seed, "refiner.optim.steps": steps}
            trial = _train(options, method, budget, with_overrides(config, own), *stages[name])
            print(method, name, budget, trial.steps, _mean(trial.psnr), flush=True)
            trials.append(trial)
            save_trials(kept, trials)
    _write(options, trials)


def _file(options: Options) -> Path:
    return options.output / f"{options.resolution}-compute-{options.views}.md"


def _config(options: Options, method: str, budget: float) -> Config:
    size = CODES[max(start for start in CODES if start <= budget)]
    knobs = {"codebook.size": size, "field.optim.steps": options.field_steps} | SIZES[method]
    return with_overrides(preset(method, options.resolution), knobs)


def _steps_within(budget: float, config: Config, scene: Scene, renders: Renders) -> int:
    """Steps that fit into a budget, from the times of two evaluations of a short training."""
    device, times = choose_device(), []
    short = {"refiner.optim.steps": _TIMED, "refiner.optim.evaluations": 2}
    begin = clock(device)
    refiner = train_refiner(
        with_overrides(config, short), scene, renders, device=device,
        report=lambda step, metrics, kept: times.append(clock(device) - begin),
    )  # fmt: skip
    begin = clock(device)
    refine_views(refiner, renders.of(split_views(scene.num_views, config.data).val), device)
    evaluation = clock(device) - begin
    step = (times[1] - times[0] - evaluation) * 2 / _TIMED
    start = times[0] - evaluation - step * _TIMED / 2
    return max(1, int((budget - start - evaluation) / step))


def _train(
    options: Options, method: str, budget: float, config: Config, scene: Scene, renders: Renders
) -> Trial:
    device = choose_device()
    begin = clock(device)
    refiner = train_refiner(
        config, scene, renders, device=device, report=lambda step, metrics, kept: None
    )
    seconds = clock(device) - begin
    split = split_views(scene.num_views, config.data)
    views = split.val if options.views == "val" else split.test
    after = score_views(refine_views(refiner, renders.of(views), device), scene.images[views])
    before = score_views(renders.rgb[views], scene.images[views])
    pairs = list(zip(after, before, strict=True))
    return Trial(
        method, scene.name, config.seed, budget, seconds, config.refiner.optim.steps,
        [a.psnr - b.psnr for a, b in pairs], [a.ssim - b.ssim for a, b in pairs],
        provenance(options.threads),
    )  # fmt: skip


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 4)


def _write(options: Options, trials: list[Trial]) -> None:
    def of(method: str, budget: float) -> list[Trial]:
        own = [t for t in trials if (t.method, t.budget) == (method, budget)]
        return [t for t in own if t.scene in options.scenes and t.seed < options.seeds]

    def by_view(method: str, budget: float) -> dict[str, torch.Tensor]:
        """For each scene the gains of each view in PSNR and SSIM, means over seeds."""
        own = of(method, budget)
        gains = {
            name: [[t.psnr, t.ssim] for t in own if t.scene == name] for name in options.scenes
        }
        return {name: torch.tensor(seeds).double().mean(0).T for name, seeds in gains.items()}

    lines = [
        f"# Codes and network at equal compute: {options.resolution}, {options.views} views\n",
        *sorted({t.provenance for t in trials}),
        f"Stage 1 trained {options.field_steps} steps; {options.seeds} seeds; seconds and steps "
        "are means over scenes and seeds. Gains over stage 1 in dB.\n",
        f"| budget | method | seconds | steps | {' | '.join(options.scenes)} | mean of scenes "
        "| SSIM | views worse |",
        "|---" * (7 + len(options.scenes)) + "|",
    ]  # fmt: skip
    for budget in options.budgets:
        for method in SIZES:
            own = of(method, budget)
            gains = by_view(method, budget)
            means = [gain[:, 0].mean().item() for gain in gains.values()]
            cells = [
                f"{budget:g} s", f"`{method}`", f"{_mean([t.seconds for t in own]):.0f}",
                f"{_mean([t.steps for t in own]):.0f}", *(f"{mean:+.2f}" for mean in means),
                f"**{_mean(means):+.3f}**", f"{torch.cat(list(gains.values()))[:, 1].mean():+.4f}",
                f"{sum(int((gain[:, 0] < 0).sum()) for gain in gains.values())}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| budget | `cb-nerf` - `cnn`, PSNR | t interval |", "|---|---|---|"]
    for budget in options.budgets:
        first, second = by_view("cb-nerf", budget), by_view("cnn", budget)
        mean, half, _, _ = interval({scene: first[scene] - second[scene] for scene in first})
        low, high = (mean - half)[0], (mean + half)[0]
        lines.append(f"| {budget:g} s | {mean[0]:+.3f} | {low:+.3f} ... {high:+.3f} |")
    file = _file(options)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(tyro.cli(Options))

"""Do the knobs of the search act? The effect of each on the gain of `cb-nerf`.

    python benchmarks/sensitivity.py --data ../shared/llff --cache runs/codebook

Trains stage 1 of each scene once. Then each knob takes the values of `VALUES` in turn, the others
those of the preset. Prints and writes, for each value, the change of the gain in PSNR against the
preset, as a mean over views of all scenes with an interval of 95 % (Student's t over views, each
the mean of its seeds), and in the last row that of all the paper's values together.

Trainings are kept in the JSON file as they end: the same command resumes, and one with more seeds
trains only what is new.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import stage_1
import torch
import tyro
from codebook import interval
from provenance import provenance
from torch import Tensor
from trials import load_trials, save_trials

from cbnerf.data.renders import Renders
from cbnerf.data.scene import Scene
from cbnerf.data.splits import split_views
from cbnerf.overrides import with_overrides
from cbnerf.presets import preset
from cbnerf.training.distributed import choose_device
from cbnerf.training.evaluation import refine_views, score_views
from cbnerf.training.refiner import train_refiner

VALUES: dict[str, tuple[float, ...]] = {
    "codebook.size": (256, 4096),
    "codebook.beta": (0.05, 2.0),
    "loss.lambda_refine": (0.3, 3.0),
    "loss.lambda_recon": (0.001, 0.3, 10.0),
    "loss.lambda_vq": (0.001, 0.1, 10.0),
    "loss.lambda_imitation": (0.0001, 0.03, 10.0),
}
"""Values across the ranges of `tune_configs/default.yaml`, beside those of the preset."""
PAPER = {"loss.lambda_recon": 10.0, "loss.lambda_vq": 1.0, "loss.lambda_imitation": 1.0}
"""The paper's values where the preset has others."""
CHANGES: dict[str, dict[str, Any]] = {
    "the preset": {},
    **{
        f"`{knob} = {value:g}`": {knob: int(value) if knob == "codebook.size" else value}
        for knob, values in VALUES.items()
        for value in values
    },
    "the paper's weights": PAPER,
}


@dataclass(kw_only=True)
class Options(stage_1.Options):
    steps: int = 300
    """Updates of the refiner."""
    batch_size: int = 8
    """Its patches per update."""
    seeds: int = 3
    output: Path = Path("benchmarks/results/codebook")
    """Receives RESOLUTION-sensitivity.md and .json."""


@dataclass
class Trial:
    change: str
    scene: str
    seed: int
    steps: int
    batch_size: int
    psnr: list[float]
    """Gain of each view in dB."""
    provenance: str
    """From what code, when and where."""


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    config = with_overrides(
        preset("cb-nerf", options.resolution), {"field.optim.steps": options.field_steps}
    )
    stages = {
        name: stage_1.render_stage_1(config, options.data, name, options.cache)
        for name in options.scenes
    }
    kept = _file(options).with_suffix(".json")
    trials = load_trials(kept, Trial)
    for seed, change, name in product(range(options.seeds), CHANGES, options.scenes):
        if not _of(options, trials, change, name, seed):
            trials.append(_train(options, change, seed, *stages[name]))
            print(change, name, seed, trials[-1].psnr, flush=True)
            save_trials(kept, trials)
    _write(options, trials)


def _file(options: Options) -> Path:
    return options.output / f"{options.resolution}-sensitivity.md"


def _of(
    options: Options, trials: Sequence[Trial], change: str, scene: str, seed: int
) -> list[Trial]:
    wanted = (change, scene, seed, options.steps, options.batch_size)
    return [t for t in trials if (t.change, t.scene, t.seed, t.steps, t.batch_size) == wanted]


def _train(options: Options, change: str, seed: int, scene: Scene, renders: Renders) -> Trial:
    schedule = {
        "refiner.optim.steps": options.steps, "refiner.optim.batch_size": options.batch_size,
        "refiner.optim.evaluations": 1, "seed": seed,
    }  # fmt: skip
    config = with_overrides(preset("cb-nerf", options.resolution), schedule | CHANGES[change])
    device = choose_device()
    refiner = train_refiner(
        config, scene, renders, device=device, report=lambda step, metrics, kept: None
    )
    views = split_views(scene.num_views, config.data).test
    refined = _psnr(refine_views(refiner, renders.of(views), device), scene.images[views])
    gains = refined - _psnr(renders.rgb[views], scene.images[views])
    return Trial(
        change, scene.name, seed, options.steps, options.batch_size, gains.tolist(),
        provenance(options.threads),
    )  # fmt: skip


def _psnr(images: Tensor, targets: Tensor) -> Tensor:
    return torch.tensor([score.psnr for score in score_views(images, targets)]).double()


def _write(options: Options, trials: list[Trial]) -> None:
    def by_view(change: str) -> dict[str, Tensor]:
        """For each scene the gain of each view, a mean over seeds."""
        return {
            name: torch.tensor(
                [_of(options, trials, change, name, seed)[0].psnr for seed in range(options.seeds)],
                dtype=torch.float64,
            ).mean(0)
            for name in options.scenes
        }

    before = by_view("the preset")
    lines = [
        f"# Effects of single knobs on `cb-nerf`: {options.resolution}, test views\n",
        *sorted({trial.provenance for trial in trials}),
        f"Stage 1 trained {options.field_steps} steps, the refiner {options.steps} steps of "
        f"{options.batch_size} patches; {options.seeds} seeds. The preset gains "
        f"{torch.cat(list(before.values())).mean():+.3f} dB.\n",
        "| change | effect in dB | t interval |",
        "|---|---|---|",
    ]
    for change in list(CHANGES)[1:]:
        after = by_view(change)
        difference = {scene: (after[scene] - before[scene])[:, None] for scene in before}
        mean, half, _, _ = (float(x) for x in interval(difference))
        lines.append(f"| {change} | {mean:+.3f} | {mean - half:+.3f} ... {mean + half:+.3f} |")
    _file(options).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Options))

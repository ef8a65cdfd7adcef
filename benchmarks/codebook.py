"""Does the codebook pay? The refiner with its codes on and off, from the same stage-1 renders.

    python benchmarks/codebook.py --data ../shared/llff --cache runs/codebook

Trains stage 1 of each scene once, then for each scene and seed the refiner with codes and its
control, `cnn`: the same network, steps, seeds and patches without codes. Beside them stand stage 1
and the fitted filter `linear`. Prints and writes mean scores of held-out views and paired
differences: means over views, each of which is the mean over seeds, with intervals of 95 %
(Student's t over views, and a bootstrap that draws scenes, then views). `--protocol unseen-scene`
trains refiners on the other scenes alone, `low-res-only` a scale below, `--shared` one on all.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import stage_1
import torch
import tyro
from provenance import provenance
from scipy.stats import t as student
from torch import Tensor

from cbnerf.config import Config
from cbnerf.data.renders import Renders
from cbnerf.data.scene import Scene
from cbnerf.data.splits import split_views
from cbnerf.overrides import read_knob, with_overrides
from cbnerf.presets import preset
from cbnerf.training.distributed import choose_device
from cbnerf.training.evaluation import refine_views, score_views
from cbnerf.training.refiner import train_refiner

METRICS = ("PSNR", "SSIM", "FLIP")
HEALTH = ("codebook/used", "codebook/perplexity", "codebook/agreement")
ROWS: dict[str, dict[str, Any]] = {
    "codes on": {},
    "codes off": {"refiner.kind": "cnn"},
    "linear": {"refiner.kind": "linear"},
}


@dataclass(kw_only=True)
class Options(stage_1.Options):
    seeds: int = 3
    views: str = "test"
    """`test`, or `val` to select on."""
    protocol: Literal["holdout", "unseen-scene", "low-res-only"] = "holdout"
    """As in `cbnerf compare`."""
    shared: bool = False
    """One refiner, and one codebook, for all scenes."""
    name: str = ""
    """Of the files; the default says resolution and protocol."""
    output: Path = Path("benchmarks/results/codebook")
    overrides: tuple[str, ...] = field(default_factory=tuple)
    """KNOB=VALUE of all refiners."""


@dataclass
class Trial:
    """A refiner's change of the scores of stage 1, one row per view."""

    row: str
    scene: str
    seed: int
    gains: Tensor
    health: dict[str, float]


def main(options: Options) -> None:
    if options.protocol != "holdout" and options.shared:
        raise SystemExit("--shared: a refiner for all scenes knows each of them (holdout)")
    torch.set_num_threads(options.threads)
    knobs = dict(item.split("=", 1) for item in options.overrides)
    parsed = {name: read_knob(name, value) for name, value in knobs.items()}
    schedule = {"field.optim.steps": options.field_steps, "refiner.optim.evaluations": 1}
    config = with_overrides(preset("cb-nerf", options.resolution), schedule | parsed)
    pairs = {
        name: stage_1.render_stage_1(config, options.data, name, options.cache)
        for name in options.scenes
    }
    below = {}
    if options.protocol == "low-res-only":
        below = {
            name: stage_1.render_stage_1(config, options.data, name, options.cache, below=True)
            for name in options.scenes
        }
    trials: list[Trial] = []
    for served in [options.scenes] if options.shared else [(scene,) for scene in options.scenes]:
        for row, change in ROWS.items():
            for seed in range(1 if row == "linear" else options.seeds):
                trained = with_overrides(config, change | {"seed": seed})
                for trial in _try(options, trained, pairs, below, row, served, seed):
                    print(row, trial.scene, seed, trial.gains.mean(0).tolist(), flush=True)
                    trials.append(trial)
    bases = {name: _base(options, config, *pair) for name, pair in pairs.items()}
    _write(options, trials, bases)


def _views(options: Options, config: Config, scene: Scene) -> list[int]:
    split = split_views(scene.num_views, config.data)
    return split.val if options.views == "val" else split.test


def _score(images: Tensor, targets: Tensor) -> Tensor:
    scores = score_views(images, targets, perceptual=True)
    return torch.tensor([[s.psnr, s.ssim, s.flip] for s in scores], dtype=torch.float64)


def _base(options: Options, config: Config, scene: Scene, renders: Renders) -> Tensor:
    views = _views(options, config, scene)
    return _score(renders.rgb[views], scene.images[views])


def _try(
    options: Options, config: Config, pairs: dict[str, tuple[Scene, Renders]],
    below: dict[str, tuple[Scene, Renders]], row: str, served: tuple[str, ...], seed: int,
) -> Iterator[Trial]:  # fmt: skip
    """Train one refiner, and score it on each scene that it serves."""
    (scene, renders), *joint = (pairs[name] for name in served)
    sources = []
    if options.protocol == "unseen-scene":
        sources = [pair for other, pair in pairs.items() if other not in served]
    elif below:
        sources = [below[name] for name in served]
    last: dict[str, float] = {}
    device = choose_device()
    refiner = train_refiner(
        config, scene, renders,
        device=device, report=lambda step, metrics, kept: last.update(metrics),
        joint=joint, sources=sources,
    )  # fmt: skip
    health = {key: last[key] for key in HEALTH if key in last}
    for name in served:
        scene, renders = pairs[name]
        views = _views(options, config, scene)
        scores = _score(refine_views(refiner, renders.of(views), device), scene.images[views])
        yield Trial(row, name, seed, scores - _base(options, config, scene, renders), health)


def by_view(trials: list[Trial], row: str) -> dict[str, Tensor]:
    """For each scene the gains of each view, `[views metrics]`, means over seeds."""
    scenes = list(dict.fromkeys(trial.scene for trial in trials))
    return {
        scene: torch.stack([t.gains for t in trials if (t.row, t.scene) == (row, scene)]).mean(0)
        for scene in scenes
    }


def interval(differences: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean over all views, half-width by Student's t over views, and the bootstrap's bounds."""
    values = torch.cat(list(differences.values()))
    mean, count = values.mean(0), len(values)
    half = float(student.ppf(0.975, count - 1)) * values.std(0) / math.sqrt(count)
    generator = torch.Generator().manual_seed(0)
    means = []
    scenes = list(differences.values())
    for _ in range(4000):
        chosen = torch.randint(len(scenes), (len(scenes),), generator=generator).tolist()
        drawn = [
            scenes[i][torch.randint(len(scenes[i]), (len(scenes[i]),), generator=generator)]
            for i in chosen
        ]
        means.append(torch.cat(drawn).mean(0))
    low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975]).double(), dim=0)
    return mean, half, low, high


def _write(options: Options, trials: list[Trial], bases: dict[str, Tensor]) -> None:
    protocol = options.protocol + ("-shared" if options.shared else "")
    gains = {row: by_view(trials, row) for row in ROWS}
    lines = [
        f"# Codes on and off: {options.resolution}, {protocol}, {options.views} views\n",
        provenance(options.threads),
        f"Stage 1 trained {options.field_steps} steps; {options.seeds} seeds; changes against "
        "stage 1, of FLIP lower is better.\n",
        "| scene | row | PSNR | SSIM | FLIP |",
        "|---|---|---|---|---|",
    ]
    for scene, base in bases.items():
        p, s, f = base.mean(0).tolist()
        lines.append(f"| {scene} | stage 1 | {p:.2f} | {s:.4f} | {f:.4f} |")
        for row in ROWS:
            p, s, f = gains[row][scene].mean(0).tolist()
            lines.append(f"| {scene} | {row} | {p:+.3f} | {s:+.4f} | {f:+.4f} |")
    for row in ROWS:
        values = torch.cat(list(gains[row].values()))
        p, s, f = values.mean(0).tolist()
        worse = int((values[:, 0] < 0).sum())
        name = f"{row}, {worse} of {len(values)} views worse in PSNR"
        lines.append(f"| mean | {name} | {p:+.3f} | {s:+.4f} | {f:+.4f} |")
    lines += ["", "| paired difference | metric | mean | t interval | bootstrap interval |",
              "|---|---|---|---|---|"]  # fmt: skip
    pairs = [("codes on", "codes off"), ("codes on", "linear"), ("codes off", "linear")]
    for first, second in pairs:
        difference = {s: gains[first][s] - gains[second][s] for s in bases}
        for metric, mean, half, low, high in zip(METRICS, *interval(difference), strict=True):
            lines.append(
                f"| {first} - {second} | {metric} | {mean:+.4f} | "
                f"{mean - half:+.4f} ... {mean + half:+.4f} | {low:+.4f} ... {high:+.4f} |"
            )
    lines += ["", "| scene | codes used | perplexity | SR-HR agreement |", "|---|---|---|---|"]
    for scene in bases:
        found = [t.health for t in trials if (t.row, t.scene) == ("codes on", scene)]
        used, even, agree = (sum(h[key] for h in found) / len(found) for key in HEALTH)
        lines.append(f"| {scene} | {used:.1%} | {even:.0f} | {agree:.3f} |")
    options.output.mkdir(parents=True, exist_ok=True)
    name = options.name or f"{options.resolution}-{protocol}-{options.views}"
    file = options.output / f"{name}.md"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    plain = {
        "provenance": provenance(options.threads),
        "stage1": {scene: base.tolist() for scene, base in bases.items()},
        "gains": [vars(trial) | {"gains": trial.gains.tolist()} for trial in trials],
    }
    file.with_suffix(".json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    print(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(tyro.cli(Options))

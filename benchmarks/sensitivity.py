"""Do the knobs of the search act? The effect of each on the gain of `cb-nerf`.

    python benchmarks/sensitivity.py --data ../shared/llff --cache runs/codebook

Trains stage 1 of each scene once. Then each knob takes the values of `VALUES` in turn, the others
those of the preset. Prints and writes, for each value, the change of the gain in PSNR against the
preset, as a mean over views of all scenes with an interval of 95 % (Student's t over views, each
the mean of its seeds), and in the last row that of all the paper's values together.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import stage_1
import torch
import tyro
from codebook import interval
from provenance import provenance
from torch import Tensor

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


@dataclass(kw_only=True)
class Options(stage_1.Options):
    steps: int = 300
    """Updates of the refiner."""
    batch_size: int = 8
    """Its patches per update."""
    seeds: int = 3
    output: Path = Path("benchmarks/results/codebook")
    """Receives RESOLUTION-sensitivity.md."""


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    changes: dict[str, dict[str, Any]] = {
        f"{knob} = {value:g}": {knob: int(value) if knob == "codebook.size" else value}
        for knob, values in VALUES.items()
        for value in values
    }
    config = with_overrides(
        preset("cb-nerf", options.resolution), {"field.optim.steps": options.field_steps}
    )
    pairs = {
        name: stage_1.render_stage_1(config, options.data, name, options.cache)
        for name in options.scenes
    }
    before = _gains(options, pairs, {})
    lines = [
        f"# Effects of single knobs on `cb-nerf`: {options.resolution}, test views\n",
        provenance(options.threads),
        f"Stage 1 trained {options.field_steps} steps, the refiner {options.steps} steps of "
        f"{options.batch_size} patches; {options.seeds} seeds. The preset gains "
        f"{torch.cat(list(before.values())).mean():+.3f} dB.\n",
        "| change | effect in dB | t interval |",
        "|---|---|---|",
    ]
    for name, change in (changes | {"the paper's weights": PAPER}).items():
        after = _gains(options, pairs, change)
        difference = {scene: (after[scene] - before[scene])[:, None] for scene in pairs}
        mean, half, _, _ = (float(x) for x in interval(difference))
        lines.append(f"| `{name}` | {mean:+.3f} | {mean - half:+.3f} ... {mean + half:+.3f} |")
        print(lines[-1], flush=True)
    file = options.output / f"{options.resolution}-sensitivity.md"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _gains(
    options: Options, pairs: dict[str, tuple[Scene, Renders]], change: dict[str, Any]
) -> dict[str, Tensor]:
    """The gain in PSNR of each test view of each scene, a mean over seeds."""
    schedule = {
        "refiner.optim.steps": options.steps, "refiner.optim.batch_size": options.batch_size,
        "refiner.optim.evaluations": 1,
    }  # fmt: skip
    device, gains = choose_device(), {}
    for name, (scene, renders) in pairs.items():
        views = split_views(scene.num_views, preset("cb-nerf").data).test
        base = _psnr(renders.rgb[views], scene.images[views])
        runs = []
        for seed in range(options.seeds):
            config = with_overrides(
                preset("cb-nerf", options.resolution), schedule | change | {"seed": seed}
            )
            refiner = train_refiner(
                config, scene, renders, device=device, report=lambda step, metrics, kept: None
            )
            refined = refine_views(refiner, renders.of(views), device)
            runs.append(_psnr(refined, scene.images[views]) - base)
        gains[name] = torch.stack(runs).mean(0)
    return gains


def _psnr(images: Tensor, targets: Tensor) -> Tensor:
    return torch.tensor([score.psnr for score in score_views(images, targets)]).double()


if __name__ == "__main__":
    main(tyro.cli(Options))

"""Time to the best held-out PSNR of the published refiner, ours against it, on the same renders.

    python benchmarks/refiner.py --data ../shared/llff --renders runs/codebook/x2-128-1500

`--renders` holds a folder per scene with the `renders.npz` of a trained stage 1, such as the cache
of `benchmarks/codebook.py`. The published refiner trains for `--budget` seconds and ours for its
preset. Prints and writes when each first reached the best mean PSNR of test views that the
published one ever had. On a CPU with one thread, times are the process's CPU seconds, of training
and of the evaluations in it: other load does not count.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from clock import TimeIsUp, clock
from provenance import provenance

from cbnerf.data.captures import read_capture
from cbnerf.data.renders import Renders, load_renders
from cbnerf.data.scene import Scene, make_scene
from cbnerf.data.splits import split_views
from cbnerf.overrides import with_overrides
from cbnerf.presets import preset
from cbnerf.training.checkpoint import Checkpoint
from cbnerf.training.distributed import choose_device
from cbnerf.training.evaluation import mean_scores, refine_views
from cbnerf.training.models import build_refiner
from cbnerf.training.refiner import train_refiner
from cbnerf.training.stages import RENDERS_FILE


@dataclass(kw_only=True)
class Options:
    data: Path
    """Folder of LLFF scene folders."""
    renders: Path
    scenes: tuple[str, ...] = ("fern",)
    resolution: str = "x2-128"
    budget: float = 120.0
    """Seconds of the published refiner."""
    paper_batch: int = 32
    """Patches of an update of the published refiner."""
    threads: int = 1
    output: Path = Path("benchmarks/results/refiner")
    """Receives RESOLUTION-cpu.json and .md, or -gpu."""


@dataclass
class Run:
    scene: str
    method: str
    stage1: float
    steps_per_second: float
    curve: list[tuple[float, float]]
    """(seconds, mean PSNR of the test views)."""

    def best(self) -> float:
        return max(psnr for _, psnr in self.curve)

    def seconds_to(self, psnr: float) -> float | None:
        return next((seconds for seconds, reached in self.curve if reached >= psnr), None)


def follow(method: str, options: Options, scene: Scene, renders: Renders, budget: float) -> Run:
    """Train a refiner until its schedule or the budget ends."""
    device = choose_device()
    schedule = {"refiner.optim.evaluations": 5}
    if method == "cb-nerf-paper":
        # The published rate is constant, so a long schedule can be left at any time.
        schedule = {
            "refiner.optim.evaluations": 500,
            "refiner.optim.steps": 10_000,
            "refiner.optim.batch_size": options.paper_batch,
        }
    config = with_overrides(preset(method, options.resolution), schedule)
    test = split_views(scene.num_views, config.data).test
    run = Run(scene.name, method, _psnr(renders.rgb[test], scene.images[test]), 0.0, [])
    spent, since = 0.0, clock(device)

    def score(step: int, metrics: dict[str, float], checkpoint: Checkpoint, /) -> None:
        nonlocal spent, since
        spent += clock(device) - since
        refiner = build_refiner(config).to(device)
        refiner.load_state_dict(checkpoint.model)
        refined = refine_views(refiner.eval(), renders.of(test), device)
        run.curve.append((spent, _psnr(refined, scene.images[test])))
        run.steps_per_second = step / spent
        print(f"{method} {step}: {spent:.1f} s, {run.curve[-1][1]:.2f} dB", flush=True)
        if spent > budget:
            raise TimeIsUp
        since = clock(device)

    try:
        train_refiner(config, scene, renders, device=device, report=score)
    except TimeIsUp:
        pass
    return run


def _psnr(images: torch.Tensor, targets: torch.Tensor) -> float:
    return mean_scores(images, targets, "test")["test/psnr"]


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    about = provenance(options.threads)
    runs: list[Run] = []
    data = preset("cb-nerf", options.resolution).data
    for name in options.scenes:
        scene = make_scene(read_capture(options.data / name, data.width), data)
        renders = load_renders(options.renders / name / RENDERS_FILE)
        runs.append(follow("cb-nerf-paper", options, scene, renders, options.budget))
        runs.append(follow("cb-nerf", options, scene, renders, float("inf")))
    _write(options, about, runs)


def _write(options: Options, about: str, runs: list[Run]) -> None:
    lines = [
        f"# Time to the published refiner's best PSNR at {options.resolution}\n",
        about,
        f"The published refiner was given {options.budget:.0f} s and {options.paper_batch} patches "
        "a step.\n",
        "| scene | method | stage 1 | best PSNR | s to the published best | steps/s |",
        "|---|---|---|---|---|---|",
    ]
    paper: dict[str, float] = {}
    for run in runs:
        paper.setdefault(run.scene, run.best())
        seconds = run.seconds_to(paper[run.scene])
        lines.append(
            f"| {run.scene} | {run.method} | {run.stage1:.2f} | {run.best():.2f} | "
            f"{'never' if seconds is None else f'{seconds:.1f}'} | {run.steps_per_second:.1f} |"
        )
    device = "gpu" if torch.cuda.is_available() else "cpu"
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / f"{options.resolution}-{device}.md"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    plain = {"provenance": about, "runs": [asdict(run) for run in runs]}
    file.with_suffix(".json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    print(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(tyro.cli(Options))

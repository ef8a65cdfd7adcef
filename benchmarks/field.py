"""Stage 1 on held-out views: quality and speed of the planes beside NeRF-SR's MLP, in one run.

    python benchmarks/field.py --data ../shared/llff --scenes fern flower room --resolution x2-252

Prints and writes, per scene, the test PSNR / SSIM at high resolution of
(a) the planes field, (b) the MLP field given `--mlp-time` times its training time, (c) bicubic
enlargement of the planes field's own low-res render, (c') of the true low-res test views, (d) the
planes field trained on the high-res photographs (the ceiling), (e) the planes field trained on
enlarged low-res photographs, a ray a pixel; and the ratio of the times at which (b) and (a) reach
(b)'s last PSNR.
On a CPU with one thread, times are the process's CPU seconds: other load does not count.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import tyro
from clock import TimeIsUp, clock
from provenance import provenance

from cbnerf.config import Config
from cbnerf.data.captures import read_capture
from cbnerf.data.scene import Scene, make_scene
from cbnerf.data.splits import split_views
from cbnerf.metrics import to_8bit
from cbnerf.nerf.model import build_field
from cbnerf.overrides import read_knob, with_overrides
from cbnerf.presets import preset
from cbnerf.training.checkpoint import Checkpoint
from cbnerf.training.distributed import choose_device
from cbnerf.training.evaluation import mean_scores, render_views
from cbnerf.training.field import train_field
from cbnerf.training.loop import num_steps


@dataclass(kw_only=True)
class Options:
    data: Path
    """Folder of LLFF scene folders."""
    scenes: tuple[str, ...] = ("fern", "flower", "room")
    resolution: str = "x2-252"
    mlp_time: float = 10.0
    """Training time of the MLP as a multiple of that of the planes; 0 leaves it out."""
    mlp_batch: int = 64
    """Low-res pixels of one update of the MLP; the published 512 leave a CPU too few updates."""
    points: int = 12
    """Points of the planes' curves."""
    mlp_points: int = 3
    """Points of the MLP's curve; a render for one takes as long as half the planes' training."""
    threads: int = 1
    output: Path = Path("benchmarks/results/field")
    """Receives NAME.json and NAME.md."""
    overrides: tuple[str, ...] = field(default_factory=tuple)
    """KNOB=VALUE of the planes field."""


class Run(NamedTuple):
    psnr: float
    ssim: float
    bicubic_psnr: float
    """Of its low-res version, enlarged."""
    true_bicubic_psnr: float
    """Of the low-res photographs, enlarged: what no training knows."""
    train_psnr: float | None
    """Of as many renders of training views, at high resolution; None for the MLP."""
    seconds: float
    """Of training, evaluation left out (see `clock`)."""
    curve: list[tuple[float, float]]
    """(seconds, PSNR of the first test view)."""


def train(
    config: Config,
    scene: Scene,
    budget: float = float("inf"),
    photographs: torch.Tensor | None = None,
) -> Run:
    """Train a field and follow one test view; stops at `budget` seconds of training. It learns from
    `photographs`, by default those of the scene."""
    device = choose_device()
    split = split_views(scene.num_views, config.data)
    test, training = split.test, split.train[:: len(split.train) // len(split.test)]
    targets = scene.images[test]
    cameras = scene.cameras(device)
    curve: list[tuple[float, float]] = []
    steps = num_steps(config, "field", [scene])
    spent, since = 0.0, clock(device)
    last: dict[str, float] = {}

    def follow(step: int, metrics: dict[str, float], checkpoint: Checkpoint, /) -> None:
        nonlocal spent, since, last
        spent += clock(device) - since
        model = build_field(config, cameras).to(device)
        model.load_state_dict(checkpoint.model)
        # An MLP takes minutes to render all test views, so the curves follow one of them.
        first = render_views(model.eval(), cameras, test[:1], scene.scale).rgb
        curve.append((spent, mean_scores(first, targets[:1], "test")["test/psnr"]))
        print(f"    {spent:7.1f} s  {curve[-1][1]:.2f} dB", flush=True)
        over = spent > budget
        if over or step == steps:
            renders = render_views(model, cameras, test, scene.scale).rgb
            enlarged = _enlarge(renders, scene.scale)
            last = mean_scores(renders, targets, "test") | {
                "bicubic": mean_scores(enlarged, targets, "test")["test/psnr"],
                "true": mean_scores(_enlarge(targets, scene.scale), targets, "test")["test/psnr"],
            }
            if config.field.kind == "planes":
                seen = render_views(model, cameras, training, scene.scale).rgb
                last |= mean_scores(seen, scene.images[training], "train")
        if over:
            raise TimeIsUp
        since = clock(device)

    try:
        learned = scene if photographs is None else replace(scene, images=photographs)
        train_field(config, learned, device=device, report=follow)
    except TimeIsUp:
        pass
    return Run(
        psnr=last["test/psnr"],
        ssim=last["test/ssim"],
        bicubic_psnr=last["bicubic"],
        true_bicubic_psnr=last["true"],
        train_psnr=last.get("train/psnr"),
        seconds=spent,
        curve=curve,
    )


def _enlarge(renders: torch.Tensor, scale: int) -> torch.Tensor:
    """The low-res version of each render, enlarged again by bicubic interpolation."""
    images = renders.movedim(-1, 1).float() / 255
    low_res = F.avg_pool2d(images, scale)
    enlarged = F.interpolate(low_res, images.shape[-2:], mode="bicubic", align_corners=False)
    return to_8bit(enlarged.movedim(1, -1))


def seconds_to(curve: list[tuple[float, float]], psnr: float) -> float | None:
    """When a curve first reaches a PSNR, between its points by linear interpolation."""
    before = (0.0, 0.0)
    for point in curve:
        if point[1] >= psnr:
            share = (psnr - before[1]) / (point[1] - before[1]) if before[0] else 1.0
            return before[0] + share * (point[0] - before[0])
        before = point
    return None


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    knobs = dict(item.split("=", 1) for item in options.overrides)
    base = preset("cb-nerf", options.resolution)
    parsed = {name: read_knob(name, value) for name, value in knobs.items()}
    follow = {"data.validation": False, "field.optim.evaluations": options.points}
    config = with_overrides(base, parsed | follow)
    rows: dict[str, dict[str, Run]] = {}
    for name in options.scenes:
        capture = read_capture(options.data / name, config.data.width)
        scene = make_scene(capture, config.data)
        print(f"{name}: planes")
        runs = {"planes": train(config, scene)}
        print(f"{name}: planes, trained at high resolution")
        plain = with_overrides(config, {"data.scale": 1})
        high_res = make_scene(capture, plain.data)
        runs["ceiling"] = train(plain, high_res)
        print(f"{name}: planes, trained on enlarged photographs")
        enlarged = _enlarge(high_res.images, config.data.scale)
        runs["enlarged"] = train(plain, high_res, photographs=enlarged)
        if options.mlp_time:
            print(f"{name}: mlp")
            runs["mlp"] = _train_mlp(options, scene, options.mlp_time * runs["planes"].seconds)
        rows[name] = runs
        _write(options, rows)
    print((options.output / f"{_name(options)}.md").read_text(encoding="utf-8"))


def _train_mlp(options: Options, scene: Scene, budget: float) -> Run:
    """NeRF-SR's field with a schedule that ends with the budget, so that its rate decays, too."""
    config = preset("nerf-sr", options.resolution)
    short = {
        "data.validation": False,
        "field.num_coarse_samples": 64,
        "field.num_fine_samples": 64,
        "field.precision": "auto",
        "field.optim.batch_size": options.mlp_batch,
        "field.optim.evaluations": 1,
        "field.optim.steps": 5,
    }
    of_a_step = train(with_overrides(config, short), scene).seconds / 5
    steps = max(int(budget / of_a_step), options.mlp_points)
    whole = short | {"field.optim.evaluations": options.mlp_points, "field.optim.steps": steps}
    return train(with_overrides(config, whole), scene, budget)


def _name(options: Options) -> str:
    return f"{options.resolution}-{'gpu' if torch.cuda.is_available() else 'cpu'}"


def _write(options: Options, rows: dict[str, dict[str, Run]]) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    lines = [
        f"# Stage 1 at {options.resolution}\n",
        provenance(options.threads),
        "| scene | (a) planes | s | (b) MLP | s | (c) bicubic of (a) | (c') of true | (d) ceiling "
        "| (e) on enlarged | a-b | a-c | d-a | a-e | training views - test views of (a) "
        "| time ratio at b's end |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for scene, runs in rows.items():
        a, d, e, b = runs["planes"], runs["ceiling"], runs["enlarged"], runs.get("mlp")
        reached = seconds_to(a.curve, b.curve[-1][1]) if b else None
        cells = [
            scene,
            f"{a.psnr:.2f} / {a.ssim:.3f}",
            f"{a.seconds:.0f}",
            f"{b.psnr:.2f} / {b.ssim:.3f}" if b else "-",
            f"{b.seconds:.0f}" if b else "-",
            f"{a.bicubic_psnr:.2f}",
            f"{a.true_bicubic_psnr:.2f}",
            f"{d.psnr:.2f} / {d.ssim:.3f}",
            f"{e.psnr:.2f} / {e.ssim:.3f}",
            f"{a.psnr - b.psnr:+.2f}" if b else "-",
            f"{a.psnr - a.bicubic_psnr:+.2f}",
            f"{d.psnr - a.psnr:+.2f}",
            f"{a.psnr - e.psnr:+.2f}",
            f"{a.train_psnr - a.psnr:+.2f}" if a.train_psnr else "-",
            f"{b.seconds / reached:.0f}x" if b and reached else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    file = options.output / _name(options)
    file.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plain = {
        scene: {kind: run._asdict() for kind, run in runs.items()} for scene, runs in rows.items()
    }
    file.with_suffix(".json").write_text(json.dumps(plain, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options))

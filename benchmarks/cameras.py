"""Cameras that `cbnerf import` finds from photographs alone, against those the scenes came with.

    python benchmarks/cameras.py --cache path/to/cache --scenes path/to/llff/fern mosaic

A scene is a folder, or the name of a built-in scene, whose cameras are exact. Its photographs are
imported into `CACHE/imported/NAME`, unless that is there. Camera centres are compared after the
best similarity, as shares of the extent, which is the largest distance between two centres of the
scene's own cameras; angles are between optical axes. Then stage 1 is trained with each set of
cameras, by the same preset and seeds, and scored on the same test views. A folder that holds a
COLMAP model beside its `poses_bounds.npy` is also trained with the cameras of the model.
"""

import re
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from provenance import provenance

from cbnerf.config import Config
from cbnerf.data.captures import find_photographs, read_capture
from cbnerf.data.importing import NOTE_FILE, import_photographs
from cbnerf.data.library import make_capture
from cbnerf.data.llff import write_capture
from cbnerf.data.scene import Capture, make_scene
from cbnerf.data.splits import split_views
from cbnerf.files import atomic_write
from cbnerf.overrides import with_overrides
from cbnerf.presets import preset
from cbnerf.scenes import BUILT_IN_SCENES
from cbnerf.training.distributed import choose_device
from cbnerf.training.evaluation import mean_scores, render_views
from cbnerf.training.field import train_field

_WIDTH_OF_BUILT_IN = 504
_TIMES_FILE = "seconds.txt"
_MODEL = "sparse/0"


@dataclass(kw_only=True)
class Options:
    scenes: tuple[str, ...]
    """Scene folders, or names of built-in scenes."""
    cache: Path
    """Receives the imported scenes, which later runs use again."""
    width: int = 1008
    """Largest width at which photographs are imported."""
    resolution: str = "x2-128"
    seeds: int = 2
    threads: int = 1
    output: Path = Path("benchmarks/results/cameras")


class Alignment(NamedTuple):
    """Cameras against others of the same photographs."""

    rms: float
    """Distance of the centres as a share of the extent."""
    largest: float
    angle: float
    """Mean angle between optical axes, in degrees."""
    focal: float
    """Ratio of the focal lengths, before distortion was removed."""
    near: float
    """Ratio of the nearest depths."""


def align(source: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Scale, rotation and shift that move points `[points 3]` nearest to others (Umeyama, 1991)."""
    centred, aimed = source - source.mean(0), target - target.mean(0)
    left, spread, right = np.linalg.svd(aimed.T @ centred)
    sign = np.array([1, 1, np.linalg.det(left @ right)])
    rotation = left @ np.diag(sign) @ right
    scale = float((spread * sign).sum() / (centred**2).sum())
    return scale, rotation, target.mean(0) - scale * rotation @ source.mean(0)


def compare_cameras(found: Capture, official: Capture, zoom: float) -> Alignment:
    """`zoom` is the enlargement of the found photographs by the removal of distortion."""
    poses, target = (one.camera_to_world.double().numpy() for one in (found, official))
    scale, rotation, shift = align(poses[:, :, 3], target[:, :, 3])
    centres = scale * poses[:, :, 3] @ rotation.T + shift
    extent = np.linalg.norm(target[:, None, :, 3] - target[:, :, 3], axis=2).max()
    off = np.linalg.norm(centres - target[:, :, 3], axis=1) / extent
    axes = np.einsum("ij,vj,vi->v", rotation, poses[:, :, 2], target[:, :, 2])
    return Alignment(
        rms=float(np.sqrt((off**2).mean())),
        largest=float(off.max()),
        angle=float(np.degrees(np.arccos(np.clip(axes, -1, 1))).mean()),
        focal=float((found.intrinsics[:, 0] / official.intrinsics[:, 0]).median()) / zoom,
        near=scale * float(found.bounds.min() / official.bounds.min()),
    )


def import_once(photographs: Path, scene: Path, width: int) -> None:
    """The CPU time is that of this process and of structure from motion."""
    if scene.exists():
        return
    started, cpu = time.monotonic(), _cpu_seconds()
    import_photographs(photographs, scene, width=width, force=False, progress=_print_progress)
    seconds = time.monotonic() - started, _cpu_seconds() - cpu
    (scene / _TIMES_FILE).write_text("{:.0f} {:.0f}\n".format(*seconds), encoding="utf-8")


def _print_progress(step: str, done: int, total: int) -> None:
    print(f"    {step} {done}/{total}", end="\r", flush=True)


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def official_folder(scene: str, cache: Path) -> Path:
    """The folder of a scene; a built-in scene is drawn into the cache."""
    if scene not in BUILT_IN_SCENES:
        return Path(scene)
    folder = cache / "drawn" / scene
    if not folder.exists():
        with atomic_write(folder) as drawn:
            write_capture(drawn, make_capture(scene, width=_WIDTH_OF_BUILT_IN))
    return folder


def read_model(folder: Path, cache: Path, width: int) -> Capture | None:
    """The scene with the cameras of its COLMAP model instead of `poses_bounds.npy`."""
    if not (folder / _MODEL).exists():
        return None
    linked = cache / "models" / folder.name
    linked.mkdir(parents=True, exist_ok=True)
    for entry in ("images", "sparse"):
        (linked / entry).unlink(missing_ok=True)
        (linked / entry).symlink_to((folder / entry).resolve())
    return read_capture(linked, width)


def same_views(folder: Path, found: Path, width: int) -> Capture:
    """The views of a scene whose photographs were imported into `found`, too, in that order."""
    official = read_capture(folder, width)
    files = [find_photographs(one, width).files for one in (folder, found)]
    stems = [file.stem for file in files[0]]
    views = [stems.index(file.stem) for file in files[1]]
    return Capture(official.name, *(values[views] for values in official[1:]))


def score(capture: Capture, config: Config, seeds: int) -> list[float]:
    """PSNR of the test views in dB, for each seed."""
    scene, device = make_scene(capture, config.data), choose_device()
    test, scores = split_views(scene.num_views, config.data).test, []
    for seed in range(seeds):
        model = train_field(
            with_overrides(config, {"seed": seed}), scene, device=device, report=lambda *_: None
        )
        renders = render_views(model.eval(), scene.cameras(device), test, scene.scale)
        scores.append(mean_scores(renders.rgb, scene.images[test], "test")["test/psnr"])
        print(f"    {scores[-1]:.2f} dB", flush=True)
    return scores


class Row(NamedTuple):
    """What is measured of a scene. PSNR is that of test views in dB, one value for each seed."""

    scene: str
    placed: str
    points: float
    error: float
    """Reprojection error in pixels."""
    off: Alignment
    wall: float
    """Seconds of the import."""
    cpu: float
    official: list[float]
    """PSNR with the scene's own cameras and photographs."""
    model: list[float] | None
    """PSNR with the COLMAP model beside `poses_bounds.npy`."""
    straightened: list[float]
    """PSNR with the scene's own cameras and the photographs of the import."""
    imported: list[float]


def measure(name: str, options: Options, config: Config) -> Row:
    folder, width = official_folder(name, options.cache), config.data.width
    found_folder = options.cache / "imported" / folder.name
    photographs = find_photographs(folder, _WIDTH_OF_BUILT_IN).files
    import_once(photographs[0].parent, found_folder, options.width)
    found = read_capture(found_folder, width)
    official = same_views(folder, found_folder, width)
    model = read_model(folder, options.cache, width)
    note = (found_folder / NOTE_FILE).read_text(encoding="utf-8")
    points, error = _numbers(r"(\d+) points, mean reprojection error (\S+) pixels", note)
    straight, distorted = _numbers(r"focal length (\S+) pixels \((\S+) before", note)
    zoom = straight / distorted
    wall, cpu = map(float, (found_folder / _TIMES_FILE).read_text(encoding="utf-8").split())
    straightened = official._replace(images=found.images, intrinsics=official.intrinsics * zoom)
    return Row(
        folder.name, f"{len(found.images)} of {len(photographs)}", points, error,
        compare_cameras(found, official, zoom), wall, cpu,
        score(official, config, options.seeds),
        score(model, config, options.seeds) if model else None,
        score(straightened, config, options.seeds),
        score(found, config, options.seeds),
    )  # fmt: skip


def _numbers(pattern: str, note: str) -> tuple[float, ...]:
    match = re.search(pattern, note)
    assert match, f"no {pattern} in {note}"
    return tuple(map(float, match.groups()))


def write(rows: list[Row], options: Options) -> Path:
    lines = [
        f"# Cameras from photographs alone, and stage 1 at {options.resolution} with them\n",
        provenance(options.threads),
        "| scene | placed | points | reprojection | centres off, rms | at most | axes off, mean "
        "| focal length | nearest depth | wall | CPU |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        off = row.off
        lines.append(
            f"| {row.scene} | {row.placed} | {row.points:.0f} | {row.error:.2f} pixels "
            f"| {100 * off.rms:.3f} % | {100 * off.largest:.3f} % | {off.angle:.2f} degrees "
            f"| {100 * (off.focal - 1):+.2f} % | {100 * (off.near - 1):+.1f} % "
            f"| {row.wall:.0f} s | {row.cpu:.0f} s |"
        )
    lines += [
        f"\nPSNR of test views in dB, mean of {options.seeds} seeds (largest minus smallest):\n",
        "| scene | its own cameras (a) | its COLMAP model | (a), photographs of the import (b) "
        "| imported (c) | c - a | c - b |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        own, same, imported = map(np.mean, (row.official, row.straightened, row.imported))
        lines.append(
            f"| {row.scene} | {_spread(row.official)} | {_spread(row.model)} "
            f"| {_spread(row.straightened)} | {_spread(row.imported)} | {imported - own:+.2f} "
            f"| {imported - same:+.2f} |"
        )
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / f"{options.resolution}.md"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def _spread(scores: list[float] | None) -> str:
    return f"{np.mean(scores):.2f} ({np.ptp(scores):.2f})" if scores else "-"


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    config = preset("cb-nerf", options.resolution)
    config = with_overrides(config, {"data.validation": False, "field.optim.evaluations": 1})
    rows: list[Row] = []
    for name in options.scenes:
        print(name, flush=True)
        rows.append(measure(name, options, config))
        file = write(rows, options)
    print(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(tyro.cli(Options))

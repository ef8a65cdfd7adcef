"""The command line of the core: `cbnerf train-field`, `train-refiner`, `evaluate`, `inspect`,
`compare`, `render`, `cache`, `report`, `make-scenes`. Works without ray, optuna and mlflow.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from cbnerf.codebook.refiner import DEFAULT_TILE
from cbnerf.compare.command import Request, report_folder, settle
from cbnerf.compare.report import write_report
from cbnerf.compare.run import run_comparison
from cbnerf.config import Config, KnobError
from cbnerf.console import expand_homes, explain_unforeseen, fail, prepare_output
from cbnerf.data.library import NUM_VIEWS, default_storage, describe_photographs, make_capture
from cbnerf.data.llff import find_photographs, is_scene_folder, read_capture, write_capture
from cbnerf.data.references import find_references
from cbnerf.data.renders import Renders, load_renders
from cbnerf.data.scene import Scene, make_scene
from cbnerf.data.splits import MIN_TRAINING_VIEWS, check_views, split_views
from cbnerf.files import expand_home
from cbnerf.nerf.path import spiral_path
from cbnerf.overrides import load_config
from cbnerf.presets import DEFAULT_METHOD, DEFAULT_RESOLUTION, preset
from cbnerf.scenes import BUILT_IN_SCENES
from cbnerf.training.cache import StageCache
from cbnerf.training.checkpoint import Checkpoint, load_checkpoint
from cbnerf.training.distributed import (
    choose_device,
    from_rank_0,
    is_launched,
    joined_processes,
    process_rank,
)
from cbnerf.training.evaluation import Score, mean_score, refine_views, score_views
from cbnerf.training.inspection import inspect_codebook
from cbnerf.training.models import load_field, load_refiner
from cbnerf.training.stages import (
    CONFIG_FILE,
    FIELD_FILE,
    REFINER_FILE,
    RENDERS_FILE,
    run_field,
    run_refiner,
)
from cbnerf.training.video import write_videos

# Its knobs are flags of their own: --codebook.size, not --config.codebook.size.
Knobs = Annotated[Config, tyro.conf.arg(name="")]


@dataclass(kw_only=True)
class TrainField:
    """Train stage 1 on the low-res photographs of a scene."""

    scene: str
    """LLFF scene folder, or the name of a built-in scene."""
    output: Path
    """Folder for field.pt, renders.npz, config.yaml and metrics.json; an unfinished one goes on."""
    config: Knobs
    preset: str = DEFAULT_METHOD
    """Method, whose values the knobs below start from."""
    resolution: str = DEFAULT_RESOLUTION
    """Image size and schedule."""

    def run(self) -> None:
        with joined_processes() as device:
            scene = from_rank_0(lambda: _load_training_scene(self.scene, self.config))
            metrics = run_field(
                self.config, scene, self.output, device=device, report=_print_report
            )
            _print_metrics(self.output, metrics)


@dataclass(kw_only=True)
class TrainRefiner:
    """Train stage 2 on the photographs of a scene and the renders of its field."""

    scene: tuple[str, ...]
    """LLFF scene folder, or the name of a built-in scene; with --codebook.shared several."""
    field: tuple[Path, ...]
    """Folder that `train-field` wrote, of each scene."""
    output: Path
    """Folder for refiner.pt, strip.png, config.yaml and metrics.json; an unfinished one goes on."""
    config: Knobs
    preset: str = DEFAULT_METHOD
    """Method, whose values the knobs below start from."""
    resolution: str = DEFAULT_RESOLUTION
    """Image size and schedule; must be that of the field."""

    def run(self) -> None:
        if len(self.scene) != len(self.field):
            raise ValueError(
                f"--scene has {len(self.scene)} values, --field {len(self.field)}; give the field "
                "of each scene, in their order"
            )
        if len(self.scene) > 1 and not self.config.codebook.shared:
            raise ValueError("--scene: several scenes share a refiner with --codebook.shared only")
        with joined_processes() as device:
            (scene, renders), *joint = from_rank_0(
                lambda: list(map(self._load, self.scene, self.field))
            )
            metrics = run_refiner(
                self.config, scene, renders, self.output,
                device=device, report=_print_report, joint=joint,
            )  # fmt: skip
            _print_metrics(self.output, metrics)

    def _load(self, name: str, field: Path) -> tuple[Scene, Renders]:
        scene = _load_training_scene(name, self.config)
        return scene, _load_renders(field, _load_field_checkpoint(field), scene)


@dataclass(kw_only=True)
class Evaluate:
    """Score the test views of a scene: stage 1 and, if given, a refiner."""

    scene: str
    """LLFF scene folder, or the name of a built-in scene."""
    field: Path
    """Folder that `train-field` wrote."""
    refiner: Path | None = None
    """Folder that `train-refiner` wrote."""
    tile: int = DEFAULT_TILE
    """Side in pixels of what is refined at once: smaller takes less memory, to the same result."""

    def run(self) -> None:
        device = choose_device()
        scene, renders, test = _load_test_views(self.scene, self.field)
        rows = {"stage 1": score_views(renders.rgb[test], scene.images[test], perceptual=True)}
        if self.refiner is not None:
            refiner = load_refiner(self.refiner / REFINER_FILE, device)
            config = load_config(self.refiner / CONFIG_FILE)
            references = find_references(config, scene, renders, test)
            refined = refine_views(refiner, renders.rgb[test], device, references, tile=self.tile)
            rows["refined"] = score_views(refined, scene.images[test], perceptual=True)
        print(f"{scene.name}, protocol holdout, {scene.width}x{scene.height}")
        for name, scores in rows.items():
            for view, score in zip(test, scores, strict=True):
                _print_score(f"{name:<8} view {view:3d}", score)
            _print_score(f"{name:<8} mean    ", mean_score(scores))


@dataclass(kw_only=True)
class Inspect:
    """Picture a refiner's codebook: its codes, how often each is used, where they stand."""

    scene: str
    """LLFF scene folder, or the name of a built-in scene."""
    field: Path
    """Folder that `train-field` wrote."""
    refiner: Path
    """Folder that `train-refiner` wrote."""
    output: Path
    """Folder for codes.png, usage.png and map.png."""

    def run(self) -> None:
        device = choose_device()
        autoencoder = load_refiner(self.refiner / REFINER_FILE, device).autoencoder
        if autoencoder is None:
            raise ValueError(f"{self.refiner}: a refiner without a codebook")
        scene, renders, test = _load_test_views(self.scene, self.field)
        health = inspect_codebook(
            autoencoder, renders.rgb[test], scene.images[test], self.output, device
        )
        views = f"{len(test)} test views of {scene.name}"
        print(f"{self.output}: {views}  {_format_metrics(health)}")


@dataclass(kw_only=True)
class Compare(Request):
    """Train what is missing of several methods, score all by one protocol, write a report."""

    mlflow: bool = False
    """Log the report to MLflow, too (needs cbnerf[search])."""

    def run(self) -> None:
        if self.mlflow and importlib.util.find_spec("mlflow") is None:
            raise ValueError("--mlflow: MLflow is not installed; pip install 'cbnerf[search]'")
        comparison = settle(self)
        folder = report_folder(self, comparison)
        if self.mlflow:
            from cbnerf.search.comparison import check_mlflow

            check_mlflow(comparison.storage)
        device = choose_device()
        width = comparison.split.width
        print(f"photographs  {describe_photographs(comparison.scenes, comparison.data, width)}")
        results = run_comparison(comparison, device, lambda line: print(line, flush=True))
        print(write_report(comparison, results, folder, device))
        print(f"\nreport     {folder / 'report.html'}")
        if self.mlflow:
            from cbnerf.search.comparison import log_comparison

            print(f"MLflow     run {log_comparison(folder, comparison.storage)}")


@dataclass(kw_only=True)
class Render:
    """Render a spiral of novel views as videos and PNG files, and measure how steady they are."""

    field: Path
    """Folder that `train-field` wrote."""
    output: Path
    """Folder for stage1.mp4, stage1-000.png, ..., the same of `refined`, and video.json."""
    refiner: Path | None = None
    """Folder that `train-refiner` wrote."""
    frames: int = 60
    """Frames of one turn."""
    fps: int = 30
    """Frames per second of the video."""
    tile: int = DEFAULT_TILE
    """Side in pixels of what is refined at once: smaller takes less memory, to the same result."""

    def run(self) -> None:
        if self.frames < 1 or self.fps < 1:
            raise ValueError("--frames and --fps must be at least 1")
        device = choose_device()
        model, cameras, config = load_field(self.field / FIELD_FILE, device)
        refiner = load_refiner(self.refiner / REFINER_FILE, device) if self.refiner else None
        if refiner is not None and refiner.needs_references:
            raise ValueError(
                f"{self.refiner}: nerf-sr looks into a high-res photograph of the scene, and "
                "`render` has none; leave --refiner out"
            )
        path = spiral_path(cameras, self.frames)
        metrics = write_videos(
            model, path, config.data.scale, refiner, self.output, fps=self.fps, tile=self.tile
        )
        print(f"{self.output}: {self.frames} frames  {_format_metrics(metrics)}")


@dataclass(kw_only=True)
class Cache:
    """Look after the trained stages that studies and comparisons share."""

    action: tyro.conf.Positional[Literal["list", "verify", "prune"]]
    """`list` the entries, `verify` every byte of them, `prune` broken, idle and surplus ones."""
    storage: Path = field(default_factory=default_storage)
    """Folder that `tune.py` and `cbnerf compare` were given."""
    days: float = math.inf
    """With `prune`: remove entries not used for this many days."""
    max_gb: float = math.inf
    """With `prune`: remove the least recently used entries until this many gigabytes are left."""

    def run(self) -> None:
        cache = StageCache(self.storage / "cache")
        if not cache.folder.is_dir():
            raise ValueError(f"{cache.folder}: no such cache; give the --storage of a study")
        if not (self.days >= 0 and self.max_gb >= 0):
            raise ValueError("--days and --max-gb must be at least 0")
        if self.action == "prune":
            removed = cache.prune(idle_days=self.days, max_bytes=self.max_gb * 1e9)
            for entry in removed:
                print(entry.folder.name)
            gone = sum(entry.num_bytes for entry in removed)
            print(f"{cache.folder}: removed {len(removed)} entries, {gone / 1e6:.1f} MB")
            return
        entries = list(cache.entries(thorough=self.action == "verify"))
        for entry in entries:
            used = datetime.fromtimestamp(entry.last_used)
            print(
                f"{entry.state:<10}  {entry.num_bytes / 1e6:8.1f} MB  "
                f"used {used:%Y-%m-%d %H:%M}  {entry.folder.name}"
            )
        total = sum(entry.num_bytes for entry in entries)
        print(f"{cache.folder}: {len(entries)} entries, {total / 1e6:.1f} MB")
        broken = [entry.folder.name for entry in entries if entry.state == "broken"]
        if broken:
            raise ValueError(
                f"{cache.folder / broken[0]}: its files are not those of its manifest; it will be "
                "trained again when it is needed, or remove it with `cbnerf cache prune`"
            )


@dataclass(kw_only=True)
class Report:
    """Write the report of a study, finished or running (needs cbnerf[search])."""

    study: tyro.conf.Positional[str]
    """Name of the study."""
    storage: Path = field(default_factory=default_storage)
    """Folder that `tune.py` was given."""

    def run(self) -> None:
        if importlib.util.find_spec("optuna") is None:
            raise ValueError("Optuna is not installed; pip install 'cbnerf[search]'")
        from cbnerf.search.command import report_study

        print(report_study(self.storage, self.study))


@dataclass(kw_only=True)
class MakeScenes:
    """Write the built-in scenes as LLFF scene folders."""

    output: Path
    """Folder that receives one folder per scene."""
    scenes: str = "all"
    """`all`, or names separated by commas."""
    width: int = 504
    """Image width in pixels."""
    views: int = NUM_VIEWS
    """Photographs per scene."""

    def run(self) -> None:
        names = BUILT_IN_SCENES if self.scenes == "all" else tuple(self.scenes.split(","))
        unknown = [name for name in names if name not in BUILT_IN_SCENES]
        if unknown:
            raise ValueError(
                f"--scenes: {unknown[0]!r} is not built in; there are {', '.join(BUILT_IN_SCENES)}"
            )
        if self.width < 16 or self.views < MIN_TRAINING_VIEWS:
            raise ValueError(f"--width must be at least 16, --views at least {MIN_TRAINING_VIEWS}")
        for name in names:
            write_capture(
                self.output / name, make_capture(name, width=self.width, num_views=self.views)
            )
            print(self.output / name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line; bad input ends in one line and exit status 2, anything that nobody
    foresaw in one that names the file of its traceback, and exit status 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    storage = default_storage()
    prepare_output()
    try:
        command = parse_command(arguments)
        expand_homes(command)
        storage = getattr(command, "storage", storage)
        if is_launched() and not isinstance(command, TrainField | TrainRefiner):
            raise ValueError("torchrun is for train-field and train-refiner; start this without it")
        command.run()
    except KeyboardInterrupt:
        fail("cbnerf", "interrupted; the same command goes on from its checkpoint", 130)
    except (ValueError, OSError, FloatingPointError) as error:
        fail("cbnerf", error, 2)
    except Exception as error:
        fail("cbnerf", explain_unforeseen(error, storage), 1)


def parse_command(
    arguments: Sequence[str],
) -> (
    TrainField | TrainRefiner | Evaluate | Inspect | Compare | Render | Cache | Report | MakeScenes
):
    """The command; `--preset` and `--resolution` choose what its other flags start from."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=DEFAULT_METHOD)
    first.add_argument("--resolution", default=DEFAULT_RESOLUTION)
    chosen, _ = first.parse_known_args(arguments)
    config = preset(chosen.preset, chosen.resolution)
    field = TrainField(scene="", output=Path(), config=config)
    refiner = TrainRefiner(scene=(), field=(), output=Path(), config=config)
    for command, flag in ((field, "scene"), (field, "output"),
                          (refiner, "scene"), (refiner, "field"), (refiner, "output")):  # fmt: skip
        setattr(command, flag, tyro.MISSING)  # it must be given
    commands = (
        Annotated[TrainField, tyro.conf.subcommand("train-field", default=field)]
        | Annotated[TrainRefiner, tyro.conf.subcommand("train-refiner", default=refiner)]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Inspect, tyro.conf.subcommand("inspect")]
        | Annotated[Compare, tyro.conf.subcommand("compare")]
        | Annotated[Render, tyro.conf.subcommand("render")]
        | Annotated[Cache, tyro.conf.subcommand("cache")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[MakeScenes, tyro.conf.subcommand("make-scenes")]
    )
    boxed = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxed):
            return tyro.cli(
                commands,
                prog="cbnerf",
                description="Train, score and render Codebook-NeRF on one scene.",
                args=arguments,
            )
    except SystemExit as stop:
        # tyro draws a box around what a check of config.py says in one line.
        cause: BaseException | None = stop
        while cause is not None and not isinstance(cause, KnobError):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        print(boxed.getvalue(), end="", file=sys.stderr)
        raise


def _scene_folder(name: str) -> Path | None:
    """The folder of a scene, or None for a built-in one: what is on disk comes first."""
    folder = Path(os.path.abspath(expand_home(Path(name))))  # `.` has a name, too
    if name in BUILT_IN_SCENES and not is_scene_folder(folder):
        return None
    if not folder.is_dir():
        raise ValueError(
            f"{name}: no such folder, and no built-in scene; those are {', '.join(BUILT_IN_SCENES)}"
        )
    return folder


def _load_scene(name: str, config: Config) -> Scene:
    folder, width = _scene_folder(name), config.data.width
    capture = read_capture(folder, width) if folder else make_capture(name, width=width)
    return make_scene(capture, config.data)


def _load_training_scene(name: str, config: Config) -> Scene:
    """A scene with enough views to train on; prints which photographs are read."""
    scene = _load_scene(name, config)
    print(_describe_scene(name, config), flush=True)
    check_views(scene.num_views, config.data, name, "--{} {}".format)
    return scene


def _describe_scene(name: str, config: Config) -> str:
    """Which photographs are read, in words."""
    folder = _scene_folder(name)
    if folder is None:
        return f"photographs  built-in scene {name}"
    beside = ": the folder, not the built-in scene" if name in BUILT_IN_SCENES else ""
    return f"photographs  {find_photographs(folder, config.data.width)}{beside}"


def _load_test_views(name: str, field: Path) -> tuple[Scene, Renders, list[int]]:
    """A scene, the renders of its field, and which views are test views."""
    checkpoint = _load_field_checkpoint(field)
    scene = _load_scene(name, checkpoint.config)
    renders = _load_renders(field, checkpoint, scene)
    test = split_views(scene.num_views, checkpoint.config.data).test
    if not test:
        raise ValueError(
            f"{field}: trained on all views, none is left to score; such scores are those of "
            "`cbnerf compare --protocol table1`"
        )
    return scene, renders, test


def _load_field_checkpoint(field: Path) -> Checkpoint:
    return load_checkpoint(field / FIELD_FILE, "field", torch.device("cpu"))


def _load_renders(field: Path, checkpoint: Checkpoint, scene: Scene) -> Renders:
    """What the field of a scene has rendered."""
    if checkpoint.scene != scene.name:
        raise ValueError(f"{field}: a field of the scene {checkpoint.scene}, not of {scene.name}")
    renders = load_renders(field / RENDERS_FILE)
    if scene.images.shape != renders.rgb.shape:
        raise ValueError(
            f"{field}: its field has {_size(renders.rgb)}, the scene {_size(scene.images)}; "
            "give the photographs that it was trained on, and train-refiner its --resolution"
        )
    return renders


def _size(images: torch.Tensor) -> str:
    views, height, width, _ = images.shape
    return f"{views} views of {width}x{height}"


def _print_score(label: str, score: Score) -> None:
    seen = f"  FLIP {score.flip:.4f}" if score.flip is not None else ""
    print(f"  {label}  PSNR {score.psnr:6.2f} dB  SSIM {score.ssim:.4f}{seen}")


def _say(line: str) -> None:
    if process_rank() == 0:
        print(line, flush=True)


def _print_report(step: int, metrics: dict[str, float], checkpoint: Checkpoint, /) -> None:
    _say(f"step {step}  {_format_metrics(metrics)}")


def _format_metrics(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def _print_metrics(folder: Path, metrics: dict[str, float]) -> None:
    if process_rank() == 0:
        print(f"{folder}: {json.dumps({name: round(v, 4) for name, v in metrics.items()})}")

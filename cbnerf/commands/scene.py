"""Commands on one scene: train, evaluate, inspect, render; and `make-scenes`."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import imageio.v3 as iio
import torch
import tyro
from jaxtyping import UInt8
from torch import Tensor

from cbnerf.codebook.refiner import DEFAULT_TILE
from cbnerf.config import Config
from cbnerf.data.captures import find_photographs, is_scene_folder, read_capture
from cbnerf.data.library import NUM_VIEWS, make_capture
from cbnerf.data.llff import write_capture
from cbnerf.data.references import find_references
from cbnerf.data.renders import Renders, load_renders
from cbnerf.data.scene import Scene, make_scene
from cbnerf.data.splits import MIN_TRAINING_VIEWS, check_views, split_views
from cbnerf.files import atomic_write, check_output, expand_home
from cbnerf.nerf.path import spiral_path
from cbnerf.overrides import load_config
from cbnerf.presets import DEFAULT_METHOD, DEFAULT_RESOLUTION
from cbnerf.scenes import BUILT_IN_SCENES
from cbnerf.training.checkpoint import FIELD_FILE, REFINER_FILE, Checkpoint, load_checkpoint
from cbnerf.training.distributed import (
    choose_device,
    from_rank_0,
    joined_processes,
    process_rank,
)
from cbnerf.training.evaluation import Score, mean_score, refine_views, score_views
from cbnerf.training.inspection import inspect_codebook
from cbnerf.training.models import load_field, load_refiner
from cbnerf.training.stages import CONFIG_FILE, RENDERS_FILE, run_field, run_refiner
from cbnerf.training.video import write_videos

# Flags are spelled --codebook.size, not --config.codebook.size.
Knobs = Annotated[Config, tyro.conf.arg(name="")]


@dataclass(kw_only=True)
class TrainField:
    """Train stage 1 on the low-res photographs of a scene."""

    scene: str
    """Scene folder or name of a built-in scene."""
    output: Path
    """Folder for field.pt, renders.npz, config.yaml and metrics.json; unfinished training in it is
    resumed."""
    config: Knobs
    preset: str = DEFAULT_METHOD
    """Method; sets the defaults of the knobs below."""
    resolution: str = DEFAULT_RESOLUTION
    """Image size and schedule; also sets defaults."""

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
    """Scene folder or name of a built-in scene; several with --codebook.shared."""
    field: tuple[Path, ...]
    """Output folder of `train-field` for each scene."""
    output: Path
    """Folder for refiner.pt, strip.png, config.yaml and metrics.json; unfinished training in it is
    resumed."""
    config: Knobs
    preset: str = DEFAULT_METHOD
    """Method; sets the defaults of the knobs below."""
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
    """Evaluate stage 1 and, if given, a refiner on the test views of a scene."""

    scene: str
    """Scene folder or name of a built-in scene."""
    field: Path
    """Output folder of `train-field`."""
    refiner: Path | None = None
    """Output folder of `train-refiner`."""
    output: Path | None = None
    """New folder for the views as PNG files: stage1/000.png, refined/000.png, photographs/000.png,
    ..., numbered as the photographs of the scene."""
    tile: int = DEFAULT_TILE
    """Tile size of the refiner in pixels: smaller tiles need less memory, with the same result."""

    def run(self) -> None:
        if self.output is not None:
            check_output(self.output)
        device = choose_device()
        scene, renders, test = _load_test_views(self.scene, self.field)
        rows = {"stage 1": score_views(renders.rgb[test], scene.images[test], perceptual=True)}
        pictures = {"photographs": scene.images[test], "stage1": renders.rgb[test]}
        if self.refiner is not None:
            refiner = load_refiner(self.refiner / REFINER_FILE, device)
            config = load_config(self.refiner / CONFIG_FILE)
            references = find_references(config, scene, renders, test)
            refined = refine_views(refiner, renders.of(test), device, references, tile=self.tile)
            pictures["refined"] = refined
            rows["refined"] = score_views(refined, scene.images[test], perceptual=True)
        print(f"{scene.name}, protocol holdout, {scene.width}x{scene.height}")
        for name, scores in rows.items():
            for view, score in zip(test, scores, strict=True):
                _print_score(f"{name:<8} view {view:3d}", score)
            _print_score(f"{name:<8} mean    ", mean_score(scores))
        if self.output is not None:
            _write_views(self.output, pictures, test)
            print(f"{self.output}: {', '.join(pictures)} of {len(test)} test views")


@dataclass(kw_only=True)
class Inspect:
    """Draw the codebook of a refiner: its codes, a histogram of their use, and a map of them."""

    scene: str
    """Scene folder or name of a built-in scene."""
    field: Path
    """Output folder of `train-field`."""
    refiner: Path
    """Output folder of `train-refiner`."""
    output: Path
    """Folder for codes.png, usage.png and map.png."""

    def run(self) -> None:
        device = choose_device()
        autoencoder = load_refiner(self.refiner / REFINER_FILE, device).autoencoder
        if autoencoder is None:
            raise ValueError(f"{self.refiner}: a refiner without a codebook")
        scene, renders, test = _load_test_views(self.scene, self.field)
        health = inspect_codebook(
            autoencoder, renders.of(test), scene.images[test], self.output, device
        )
        views = f"{len(test)} test views of {scene.name}"
        print(f"{self.output}: {views}  {_format_metrics(health)}")


@dataclass(kw_only=True)
class Render:
    """Render a spiral of novel views as videos and PNG files, and measure the warping error."""

    field: Path
    """Output folder of `train-field`."""
    output: Path
    """Folder for stage1.mp4, stage1-000.png, ..., the same for `refined`, and video.json."""
    refiner: Path | None = None
    """Output folder of `train-refiner`."""
    frames: int = 60
    """Number of frames."""
    fps: int = 30
    """Frames per second of the video."""
    tile: int = DEFAULT_TILE
    """Tile size of the refiner in pixels: smaller tiles need less memory, with the same result."""

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
class MakeScenes:
    """Write the built-in scenes as LLFF scene folders."""

    output: Path
    """Folder for one folder per scene."""
    scenes: str = "all"
    """`all`, or names separated by commas."""
    width: int = 504
    """Image width in pixels."""
    views: int = NUM_VIEWS
    """Number of photographs per scene."""

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


def _scene_folder(name: str) -> Path | None:
    """The folder of a scene, or None for a built-in one; a folder takes precedence."""
    folder = Path(os.path.abspath(expand_home(Path(name))))  # `.` has a name as well
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
    scene, folder = _load_scene(name, config), _scene_folder(name)
    if folder is None:
        print(f"photographs  built-in scene {name}", flush=True)
    else:
        note = ": the folder, not the built-in scene" if name in BUILT_IN_SCENES else ""
        print(f"photographs  {find_photographs(folder, config.data.width)}{note}", flush=True)
    check_views(scene.num_views, config.data, name, "--{} {}".format)
    return scene


def _load_test_views(name: str, field: Path) -> tuple[Scene, Renders, list[int]]:
    """A scene, the renders of its field, and the indices of the test views."""
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
    """The renders of the field of a scene."""
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


def _write_views(
    folder: Path, pictures: dict[str, UInt8[Tensor, "views height width 3"]], views: list[int]
) -> None:
    """Write NAME/000.png, ... for each name, numbered as `views`; all of them or none."""
    with atomic_write(folder) as unfinished:
        for name, images in pictures.items():
            (unfinished / name).mkdir(parents=True)
            for view, image in zip(views, images, strict=True):
                iio.imwrite(unfinished / name / f"{view:03d}.png", image.numpy())


def _print_score(label: str, score: Score) -> None:
    seen = f"  FLIP {score.flip:.4f}" if score.flip is not None else ""
    print(f"  {label}  PSNR {score.psnr:6.2f} dB  SSIM {score.ssim:.4f}{seen}")


def _print_report(step: int, metrics: dict[str, float], checkpoint: Checkpoint, /) -> None:
    if process_rank() == 0:
        print(f"step {step}  {_format_metrics(metrics)}", flush=True)


def _format_metrics(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def _print_metrics(folder: Path, metrics: dict[str, float]) -> None:
    if process_rank() == 0:
        print(f"{folder}: {json.dumps({name: round(v, 4) for name, v in metrics.items()})}")

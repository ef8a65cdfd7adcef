"""A plan: everything that is decided before a study starts, small enough to send to any worker."""

import os
from dataclasses import dataclass
from pathlib import Path

from cbnerf.config import Config, preset, with_overrides
from cbnerf.data.llff import find_scenes
from cbnerf.data.procedural import BUILT_IN_SCENES
from cbnerf.search.spec import SearchSpec

DATA_VARIABLE = "CBNERF_DATA"
DEFAULT_DATA = Path("data/nerf_llff_data")
PAPER_SCENES = ("fern", "flower", "fortress", "horns", "leaves", "orchids", "room", "trex")


@dataclass(frozen=True)
class Plan:
    """A study by name: its scenes, its base configuration, where it keeps its files."""

    name: str
    spec: SearchSpec
    base: Config
    """The preset with the fixed knobs."""
    method: str
    resolution: str
    scenes: tuple[str, ...]
    data: Path | None
    """Folder of LLFF scene folders; None means the built-in scenes."""
    storage: Path
    """Holds studies, cache and MLflow's files; shared by all machines of a cluster."""
    gpus_per_worker: int | float

    @property
    def folder(self) -> Path:
        return self.storage / "studies" / self.name

    @property
    def source(self) -> str:
        """Where the photographs come from, in words."""
        return f"photographs in {self.data}" if self.data else "built-in scenes"

    @property
    def num_units(self) -> int:
        """Pairs of configuration and scene."""
        return self.spec.trials * len(self.scenes)

    def trial_folder(self, number: int, scene: str) -> Path:
        """Where a configuration leaves what it learned on a scene."""
        return self.folder / "trials" / f"{number:04d}" / scene

    def scene_folder(self, scene: str, width: int) -> Path:
        """The LLFF folder of a scene; a built-in scene has one for each image width."""
        return self.data / scene if self.data else self.storage / f"scenes/{width}/{scene}"


def make_plan(
    spec: SearchSpec,
    *,
    scenes: str,
    data: Path | None,
    name: str | None,
    storage: Path,
    has_gpu: bool,
) -> Plan:
    """Settle what `auto` means, find the scenes, and check all of it."""
    resolution = spec.resolution
    if resolution == "auto":
        resolution = "x2-504" if has_gpu else "x2-128"
    gpus = spec.resources.gpus_per_worker
    if gpus == "auto":
        gpus = 0.25 if has_gpu else 0
    base = with_overrides(preset(spec.method, resolution), spec.fixed)
    _check_batches(base, spec.resources.workers)
    folder, available = _locate_data(data)
    chosen = choose_scenes(scenes, available, folder)
    some = "all" if scenes == "all" else "-".join(chosen)
    return Plan(
        name=_check_name(name or f"{spec.method}-{resolution}-{some}"),
        spec=spec,
        base=base,
        method=spec.method,
        resolution=resolution,
        scenes=chosen,
        data=folder,
        storage=storage.resolve(),
        gpus_per_worker=gpus,
    )


def choose_scenes(wanted: str, available: list[str], folder: Path | None) -> tuple[str, ...]:
    """`all`, or names separated by commas; `all` of LLFF data means the paper's scenes found."""
    where = str(folder) if folder else "the built-in scenes"
    if wanted == "all":
        found = [scene for scene in PAPER_SCENES if scene in available] or available
        return tuple(found)
    chosen = [scene.strip() for scene in wanted.split(",") if scene.strip()]
    unknown = [scene for scene in chosen if scene not in available]
    if unknown or not chosen:
        raise ValueError(
            f"--scenes {wanted}: no scene {unknown[0] if unknown else ''!r} in {where}; "
            f"there are {', '.join(available)}"
        )
    return tuple(dict.fromkeys(chosen))


def _check_batches(base: Config, workers: int) -> None:
    """Whole shares of a batch for each worker, even ones in stage 2."""
    shares = {"field": (base.field.optim, workers), "refiner": (base.refiner.optim, 2 * workers)}
    for stage, (optim, multiple) in shares.items():
        if workers > 1 and optim.batch_size % multiple:
            raise ValueError(
                f"{stage}.optim.batch_size = {optim.batch_size} must be a multiple of {multiple} "
                f"with resources.workers = {workers}"
            )


def _check_name(name: str) -> str:
    if Path(name).name != name or name == "..":
        raise ValueError(f"--name {name!r} is not the name of a folder")
    return name


def _locate_data(data: Path | None) -> tuple[Path | None, list[str]]:
    """The folder of scenes and their names: `--data`, else the variable, else the usual place."""
    asked = data or (Path(os.environ[DATA_VARIABLE]) if os.environ.get(DATA_VARIABLE) else None)
    folder = asked or DEFAULT_DATA
    available = find_scenes(folder)
    if available:
        return folder.resolve(), available
    if asked:
        raise ValueError(
            f"{folder}: no LLFF scenes; expected folders such as fern/poses_bounds.npy below it"
        )
    return None, list(BUILT_IN_SCENES)

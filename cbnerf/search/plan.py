"""A plan: everything that is decided before a study starts, small enough to send to any worker."""

from dataclasses import dataclass
from pathlib import Path

from cbnerf.config import Config, preset, with_overrides
from cbnerf.data.library import choose_scenes, locate_data, scene_folder
from cbnerf.search.spec import SearchSpec


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
        return scene_folder(scene, self.data, self.storage, width)


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
    folder, available = locate_data(data)
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

"""A plan: all decisions about a study before it starts, small enough to send to any worker."""

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from cbnerf.config import FIELD_KNOBS, Config
from cbnerf.data.library import choose_scenes, locate_data
from cbnerf.experiment import ALL_SCENES, Experiment
from cbnerf.overrides import with_overrides
from cbnerf.presets import choose_resolution, preset
from cbnerf.search.limits import check_costs
from cbnerf.search.space import check_space
from cbnerf.search.spec import SearchSpec
from cbnerf.training.checkpoint import Stage

FULL = 2_000_000
"""A disk with fewer free bytes counts as full."""
_USUAL_VIEWS = 15
"""Training views of fern."""


class Unit(NamedTuple):
    """The training of one configuration on one scene (or on the joint scenes) up to one rung."""

    configuration: int
    """Number of the Optuna trial."""
    scene: str
    rung: int
    """From 0; the last one is a full training."""
    overrides: dict[str, Any]

    @property
    def key(self) -> str:
        """Identifies the unit within its study: `configuration/scene/rung`."""
        return f"{self.configuration}/{self.scene}/{self.rung}"


@dataclass(frozen=True, kw_only=True)
class Plan(Experiment):
    """An experiment that searches the knobs of one method."""

    name: str
    spec: SearchSpec
    base: Config
    """The preset with the fixed knobs."""
    method: str
    resolution: str
    gpus_per_worker: int | float

    def with_precision(self, precision: str) -> "Plan":
        """The same study with `field.precision: auto` settled."""
        return replace(self, base=with_overrides(self.base, {"field.precision": precision}))

    @property
    def folder(self) -> Path:
        return self.storage / "studies" / self.name

    @property
    def lock_file(self) -> Path:
        """Lock that the driver of the study holds."""
        return self.folder / "search.lock"

    @property
    def stage(self) -> Stage:
        """The stage that is searched: stage 2 where the method has one."""
        return "field" if self.base.refiner.kind == "none" else "refiner"

    @property
    def shares_fields(self) -> bool:
        """Whether all configurations refine the renders of the same fields."""
        own = [name for name in self.spec.space if name.startswith(FIELD_KNOBS)]
        return self.stage == "refiner" and not own

    @property
    def trainings(self) -> tuple[str, ...]:
        """The trainings of a configuration at each rung: one per scene, or one of all scenes."""
        return (ALL_SCENES,) if self.base.codebook.shared else self.scenes

    @property
    def rungs(self) -> int:
        """Number of rungs; 1 if nothing is pruned between rungs.

        Fewer than specified if the lowest would be below `grace_period` steps on a usual scene.
        """
        stopping = self.spec.stopping
        is_fitted = self.base.refiner.kind == "linear"  # in one step
        if is_fitted or stopping.rule == "none":
            return 1
        num_pixels = _USUAL_VIEWS * self.base.data.width**2 * 3 // 4
        whole, rungs = self.base.num_steps(self.stage, num_pixels), stopping.rungs
        while rungs > 1 and whole // stopping.eta ** (rungs - 1) < stopping.grace_period:
            rungs -= 1
        return rungs

    def config_of(self, unit: Unit) -> Config:
        """The configuration that a unit trains."""
        return with_overrides(self.base, unit.overrides)

    def part(self, rung: int) -> int:
        """The divisor of a rung, counted from 0: it ends after 1/`part` of the steps."""
        return self.spec.stopping.eta ** (self.rungs - 1 - rung)

    def check_disk(self, needed: int = FULL) -> None:
        """ValueError for a disk that cannot hold `needed` bytes."""
        self.storage.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.storage).free
        if free < needed:
            raise ValueError(
                f"{self.storage}: {free / 1e6:.0f} MB free, the study needs about "
                f"{needed / 1e6:.0f} MB; make room or give another --storage"
            )

    def trial_folder(self, number: int, scene: str) -> Path:
        """The folder of a configuration trained on a scene, or on `ALL_SCENES`."""
        return self.folder / "trials" / f"{number:04d}" / scene

    def confirmation_folder(self, number: int, seed: int, scene: str) -> Path:
        """As `trial_folder`, trained with another seed."""
        return self.folder / "confirmation" / f"{number:04d}" / f"seed-{seed}" / scene


def make_plan(
    spec: SearchSpec,
    *,
    scenes: str | tuple[str, ...],
    data: Path | None,
    name: str | None,
    storage: Path,
    has_gpu: bool,
    resolution: str | None = None,
    cache_store: str | None = None,
) -> Plan:
    """The checked plan of a study, with `auto` settled and scenes found.

    `scenes` is the text of `--scenes`, or a tuple of the names that were found when the study was
    started: reading a study needs no photographs. `resolution` is that with which it was started.
    """
    gpus = spec.resources.gpus_per_worker
    if gpus == "auto":
        gpus = (1 if spec.resources.together else 0.25) if has_gpu else 0
    if resolution is None:
        asked = None if spec.resolution == "auto" else spec.resolution
        resolution = choose_resolution(asked, has_gpu=gpus > 0)
    base = with_overrides(preset(spec.method, resolution), spec.fixed)
    check_space(base, spec)
    check_costs(base, spec)
    _check_batches(base, spec)
    if isinstance(scenes, tuple):
        folder, chosen = data, scenes
    else:
        folder, available = locate_data(data)
        chosen = choose_scenes(scenes, available, folder)
    some = "all" if scenes == "all" else "-".join(chosen)
    return Plan(
        name=_check_name(f"{spec.method}-{resolution}-{some}" if name is None else name),
        spec=spec,
        base=base,
        method=spec.method,
        resolution=resolution,
        scenes=chosen,
        data=folder,
        storage=storage.resolve(),
        gpus_per_worker=gpus,
        cache_store=cache_store,
    )


def _check_batches(base: Config, spec: SearchSpec) -> None:
    """ValueError unless workers get equal shares of a batch, even ones if its rows alternate; in an
    elastic group whatever their number is."""
    resources = spec.resources
    workers = f"with resources.workers = {resources.shown_workers}"
    together = range(max(resources.min_workers, 2), resources.max_workers + 1)
    trained = [("field", base.field.optim), ("refiner", base.refiner.optim)]
    for stage, optim in trained[: 1 if base.refiner.kind == "none" else 2]:
        knob = f"{stage}.optim.batch_size"
        each = 2 if stage == "refiner" and base.refiner.alternates else 1
        multiple = math.lcm(*(each * count for count in together))
        if resources.is_elastic and knob in spec.space:
            raise ValueError(f"space: {knob} cannot be searched {workers}; fix the number")
        if optim.batch_size % multiple:
            raise ValueError(
                f"{knob} = {optim.batch_size} must be a multiple of {multiple} {workers}"
            )


def _check_name(name: str) -> str:
    if Path(name).name != name or name == "..":
        raise ValueError(f"--name {name!r} is not the name of a folder")
    return name

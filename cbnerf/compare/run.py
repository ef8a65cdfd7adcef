"""Train what a comparison lacks, then score every row on every scene.

Both stages stand in the cache under what determines them, so nothing is trained twice, a killed
comparison goes on where it was, and comparisons share their stages with each other (and fields with
the search).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor

from cbnerf.compare.history import RELEASED_PSNR, History, read_history
from cbnerf.compare.perceptual import Distance, load_lpips
from cbnerf.compare.protocols import (
    WITHOUT_PHOTOGRAPH,
    Protocol,
    released_psnr,
    scored_views,
    summarise,
)
from cbnerf.compare.rows import Row, make_images, make_rows
from cbnerf.config import Config, DataConfig
from cbnerf.data.library import read_scene
from cbnerf.data.pixels import scale_below
from cbnerf.data.references import reference_view
from cbnerf.data.renders import Renders, load_renders
from cbnerf.data.scene import Scene
from cbnerf.training.evaluation import score_views
from cbnerf.training.stages import RENDERS_FILE, ignore, read_metrics, run_field, run_refiner
from cbnerf.training.store import Store, field_fingerprint, refiner_fingerprint

_BELOW = "@low-res"
"""Ends the name of a scene that stands for another one a scale below."""


@dataclass(frozen=True)
class Comparison:
    """What is compared, by which protocol; all methods have the same images."""

    methods: dict[str, Config]
    protocol: Protocol
    resolution: str
    scenes: tuple[str, ...]
    data: Path | None
    """Folder of LLFF scene folders; None means the built-in scenes."""
    storage: Path

    @property
    def cache(self) -> Store:
        return Store(self.storage / "cache")

    @property
    def rows(self) -> list[Row]:
        return make_rows(self.methods, self.protocol)

    @property
    def split(self) -> DataConfig:
        """Resolution and split of all methods."""
        return next(iter(self.methods.values())).data

    def scene(self, name: str) -> Scene:
        """A scene of the comparison, or one of `sources`."""
        at_full_size = name.removesuffix(_BELOW)
        scene = read_scene(at_full_size, self.data, self.storage, self.split)
        return scene if name == at_full_size else scale_below(scene, self.split.low_res_kernel)

    def sources(self, name: str) -> list[str]:
        """What a refiner of this scene is trained on, if not on the scene itself."""
        if self.protocol == "low-res-only":
            return [name + _BELOW]
        if self.protocol == "unseen-scene":
            return [other for other in self.scenes if other != name]
        return []

    @cached_property
    def _field_keys(self) -> dict[tuple[str, str], str]:
        """By method and scene; photographs are hashed, which takes a while."""
        sources = {other for name in self.scenes for other in self.sources(name)}
        return {
            (method, name): field_fingerprint(config, self.scene(name))
            for method, config in self.methods.items()
            for name in {*self.scenes, *sources}
        }

    def served(self, method: str, name: str) -> list[str]:
        """The scenes that the refiner of this one serves: all where they share a codebook and may
        give photographs."""
        gives = self.protocol not in WITHOUT_PHOTOGRAPH
        shared = self.methods[method].codebook.shared and gives
        return sorted(self.scenes) if shared else [name]

    def field_folder(self, method: str, name: str) -> Path:
        """Where the field of a method stands for a scene or one of `sources`."""
        return self.cache.path("field", name, self._field_keys[method, name])

    def refiner_folder(self, method: str, name: str) -> Path:
        """Where the refiner of a method stands for a scene."""
        served = self.served(method, name)
        fields = [self._field_keys[method, one] for one in (*served, *self.sources(name))]
        whose = "all" if len(served) > 1 else name
        return self.cache.path("refiner", whose, refiner_fingerprint(self.methods[method], fields))


class Cost(NamedTuple):
    """What a stage takes."""

    parameters: int
    seconds: float
    """Of training, evaluations among it."""


class Scored(NamedTuple):
    """A row on one scene."""

    summary: dict[str, float]
    """One number for each metric, as the protocol says."""
    views: dict[int, dict[str, float]]
    costs: list[Cost]
    """Of stage 1 and, where there is one, stage 2."""


class Shown(NamedTuple):
    """The view of a scene that the figures show: the first scored one that is no reference."""

    view: int
    photograph: UInt8[Tensor, "height width 3"]
    images: dict[str, UInt8[Tensor, "height width 3"]]
    """By row."""


class Results(NamedTuple):
    scores: dict[str, dict[str, Scored]]
    """By row and scene."""
    shown: dict[str, Shown]
    """By scene."""
    about_lpips: str


def run_comparison(
    comparison: Comparison, device: torch.device, say: Callable[[str], None]
) -> Results:
    """Train, score; `say` gets a line for each thing done."""
    lpips, about_lpips = load_lpips(device)
    for method in comparison.methods:
        for name in comparison.scenes:
            _train_field(comparison, method, name, device, say)
    for row in comparison.rows:
        if row.part == "refined":
            for name in comparison.scenes:
                _train_refiner(comparison, row.method, name, device, say)
    results = Results({row.name: {} for row in comparison.rows}, {}, about_lpips)
    for name in comparison.scenes:
        scene = comparison.scene(name)
        views = scored_views(scene.num_views, comparison.split, comparison.protocol)
        view = next(v for v in views if v != reference_view(scene, comparison.split))
        results.shown[name] = Shown(view, scene.images[view], {})
        for row in comparison.rows:
            field = comparison.field_folder(row.method, name)
            refiner = comparison.refiner_folder(row.method, name)
            config = comparison.methods[row.method]
            images = make_images(row.part, config, scene, views, field, refiner, device)
            values = _score_images(images, scene.images[views], comparison.protocol, lpips)
            folders = (field, refiner) if row.part in ("refined", "vq-vae") else (field,)
            results.scores[row.name][name] = Scored(
                summary=_summarise(comparison, row, values, refiner),
                views=dict(zip(views, values, strict=True)),
                costs=[_cost(folder) for folder in folders],
            )
            results.shown[name].images[row.name] = images[views.index(view)]
        say(f"{name}: scored")
    return results


def _train_field(
    comparison: Comparison, method: str, name: str, device: torch.device, say: Callable[[str], None]
) -> Path:
    """The folder of a field, trained now if nobody has."""
    config, scene = comparison.methods[method], comparison.scene(name)

    def train(folder: Path) -> None:
        metrics = run_field(config, scene, folder, device=device)
        say(f"{name}: stage 1 of {method} trained in {metrics['seconds']:.0f} s")

    folder = comparison.field_folder(method, name)
    return comparison.cache.complete(folder, train)


def _train_refiner(
    comparison: Comparison, method: str, name: str, device: torch.device, say: Callable[[str], None]
) -> None:
    config, served = comparison.methods[method], comparison.served(method, name)

    def load(one: str) -> tuple[Scene, Renders]:
        folder = _train_field(comparison, method, one, device, say)
        return comparison.scene(one), load_renders(folder / RENDERS_FILE)

    def train(folder: Path) -> None:
        report, ((scene, renders), *joint) = ignore, map(load, served)
        if comparison.protocol == "table1":
            report = History(config, scene, renders, folder, device)
            report.catch_up()
        metrics = run_refiner(
            config, scene, renders, folder, device=device, report=report,
            joint=joint, sources=[load(one) for one in comparison.sources(name)],
        )  # fmt: skip
        say(f"{', '.join(served)}: stage 2 of {method} trained in {metrics['seconds']:.0f} s")

    folder = comparison.refiner_folder(method, name)
    comparison.cache.complete(folder, train)


def _score_images(
    images: UInt8[Tensor, "views height width 3"],
    targets: UInt8[Tensor, "views height width 3"],
    protocol: Protocol,
    lpips: Distance | None,
) -> list[dict[str, float]]:
    """Metrics of each view; under `table1` the released one alone."""
    pairs = list(zip(images, targets, strict=True))
    if protocol == "table1":
        return [{RELEASED_PSNR: released_psnr(*pair)} for pair in pairs]
    scores = score_views(images, targets, perceptual=True)
    values = [{k: v for k, v in score._asdict().items() if v is not None} for score in scores]
    if lpips is not None:
        for value, pair in zip(values, pairs, strict=True):
            value["lpips"] = lpips(*pair)
    return values


def _summarise(
    comparison: Comparison, row: Row, values: list[dict[str, float]], refiner: Path
) -> dict[str, float]:
    summary = summarise(values, comparison.protocol)
    if comparison.protocol == "table1" and row.part == "refined":
        # The released code also takes the best epoch.
        summary[RELEASED_PSNR] = max(summary[RELEASED_PSNR], *read_history(refiner).values())
    return summary


def _cost(folder: Path) -> Cost:
    """The cost of the stage that was trained in a folder."""
    metrics = read_metrics(folder)
    assert metrics is not None, folder
    return Cost(int(metrics["parameters"]), metrics["seconds"])

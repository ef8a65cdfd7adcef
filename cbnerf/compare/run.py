"""Train the stages that a comparison lacks, then score every row on every scene.

Trained stages are kept in the store by fingerprint: comparisons share both stages with each other
and fields with studies, and the same command resumes after a crash.
"""

from collections.abc import Callable
from dataclasses import dataclass
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
from cbnerf.data.references import reference_view
from cbnerf.data.renders import Renders, load_renders
from cbnerf.data.scene import Scene
from cbnerf.experiment import LOW_RES, Experiment
from cbnerf.training.evaluation import score_views
from cbnerf.training.stages import RENDERS_FILE, ignore, read_metrics, run_field, run_refiner
from cbnerf.training.store import refiner_fingerprint


@dataclass(frozen=True, kw_only=True)
class Comparison(Experiment):
    """What is compared, by which protocol; all methods have the same images."""

    methods: dict[str, Config]
    protocol: Protocol
    resolution: str

    @property
    def rows(self) -> list[Row]:
        return make_rows(self.methods, self.protocol)

    @property
    def split(self) -> DataConfig:
        """Resolution and split of all methods."""
        return next(iter(self.methods.values())).data

    def sources(self, name: str) -> list[str]:
        """The source scenes of a refiner that is not trained on its own scene."""
        if self.protocol == "low-res-only":
            return [name + LOW_RES]
        if self.protocol == "unseen-scene":
            return [other for other in self.scenes if other != name]
        return []

    def training_of(self, scene: str, config: Config) -> str:
        """As in any experiment, but scenes without a high-res photograph share no refiner."""
        alone = self.protocol in WITHOUT_PHOTOGRAPH
        return scene if alone else super().training_of(scene, config)

    def joint_scenes(self, method: str, name: str) -> list[str]:
        """The scenes that share the refiner of a scene, sorted; itself among them."""
        return sorted(self.scenes_of(self.training_of(name, self.methods[method])))

    def refiner_folder(self, method: str, name: str) -> Path:
        """The folder of the refiner of a scene in the store, there or not."""
        config, scenes = self.methods[method], self.joint_scenes(method, name) + self.sources(name)
        fields = [self.field_fingerprint(config, scene) for scene in scenes]
        fingerprint = refiner_fingerprint(config, fields)
        return self.cache.path("refiner", self.training_of(name, config), fingerprint)


class Cost(NamedTuple):
    """Of one stage."""

    parameters: int
    seconds: float
    """Of training, including its evaluations."""


class Scored(NamedTuple):
    """A row on one scene."""

    summary: dict[str, float]
    """Each metric over all views: `protocols.summarise`."""
    views: dict[int, dict[str, float]]
    costs: list[Cost]
    """Of stage 1 and, if the row has one, stage 2."""


class Shown(NamedTuple):
    """The view of a scene in the figures: the first scored one that is not the reference."""

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
    """Train and score; calls `say` with a line for each stage trained and scene scored."""
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
        scene = comparison.load_scene(name, comparison.split)
        views = scored_views(scene.num_views, comparison.split, comparison.protocol)
        view = next(v for v in views if v != reference_view(scene, comparison.split))
        results.shown[name] = Shown(view, scene.images[view], {})
        for row in comparison.rows:
            config = comparison.methods[row.method]
            field = comparison.field_folder(config, name)
            refiner = comparison.refiner_folder(row.method, name)
            images = make_images(row.part, config, scene, views, field, refiner, device)
            values = _score_images(images, scene.images[views], comparison.protocol, lpips)
            folders = {"field": field, "refiner": refiner}
            results.scores[row.name][name] = Scored(
                summary=_summarise(comparison, row, values, refiner),
                views=dict(zip(views, values, strict=True)),
                costs=[_cost(folders[stage]) for stage in row.stages],
            )
            results.shown[name].images[row.name] = images[views.index(view)]
        say(f"{name}: scored")
    return results


def _train_field(
    comparison: Comparison, method: str, name: str, device: torch.device, say: Callable[[str], None]
) -> tuple[Scene, Path]:
    """A scene and the folder of its field, trained now if it is not there."""
    config = comparison.methods[method]
    scene = comparison.load_scene(name, config.data)

    def train(folder: Path) -> None:
        metrics = run_field(config, scene, folder, device=device)
        say(f"{name}: stage 1 of {method} trained in {metrics['seconds']:.0f} s")

    return scene, comparison.cache.complete(comparison.field_folder(config, name), train)


def _train_refiner(
    comparison: Comparison, method: str, name: str, device: torch.device, say: Callable[[str], None]
) -> None:
    config, served = comparison.methods[method], comparison.joint_scenes(method, name)

    def load(one: str) -> tuple[Scene, Renders]:
        scene, field = _train_field(comparison, method, one, device, say)
        return scene, load_renders(field / RENDERS_FILE)

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

    comparison.cache.complete(comparison.refiner_folder(method, name), train)


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

"""What a study and a comparison share: scenes, photographs and the store of trained stages."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cbnerf.config import Config, DataConfig
from cbnerf.data.library import load_scene, scene_folder
from cbnerf.data.scene import Scene
from cbnerf.training.checkpoint import knobs_of_stage
from cbnerf.training.store import Store, field_fingerprint

ALL_SCENES = "all"
"""In place of a scene: the training that all scenes share."""
LOW_RES = "@low-res"
"""Ends the name of a scene whose low-res photographs stand for its high-res ones."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Scenes, and where their photographs and trained stages are; sent to workers as it is."""

    scenes: tuple[str, ...]
    data: Path | None
    """Folder of scene folders; None means the built-in scenes."""
    storage: Path
    """Holds studies, cache and MLflow's files; shared by all machines of a cluster."""
    cache_store: str | None = None
    """URI of a store of trained stages that other clusters share, such as s3://bucket/cache."""

    @property
    def cache(self) -> Store:
        """Trained stages of this experiment and of others."""
        return Store(self.storage / "cache", self.cache_store)

    @property
    def source(self) -> str:
        """Where the photographs come from, in words."""
        return f"photographs in {self.data}" if self.data else "built-in scenes"

    def training_of(self, scene: str, config: Config) -> str:
        """The training of the refiner of a scene: its own, or the one that all scenes share."""
        return ALL_SCENES if config.codebook.shared else scene

    def scenes_of(self, training: str) -> tuple[str, ...]:
        """The joint scenes of a training."""
        return self.scenes if training == ALL_SCENES else (training,)

    def scene_folder(self, name: str, width: int) -> Path:
        """The folder of a scene; a built-in scene has one for each image width."""
        return scene_folder(name, self.data, self.storage, width)

    def load_scene(self, name: str, data: DataConfig) -> Scene:
        """A scene by its name, which may end in `LOW_RES`; a built-in one is drawn once."""
        return _load_scene(name, self.data, self.storage, data)

    def field_fingerprint(self, config: Config, scene: str) -> str:
        """The fingerprint of a field; `field.precision` must be settled."""
        return _fingerprint(knobs_of_stage(config, "field"), scene, self.data, self.storage)

    def field_folder(self, config: Config, scene: str) -> Path:
        """The folder of a field in the store, there or not."""
        return self.cache.path("field", scene, self.field_fingerprint(config, scene))


def _load_scene(name: str, data: Path | None, storage: Path, knobs: DataConfig) -> Scene:
    scene = load_scene(name.removesuffix(LOW_RES), data, storage, knobs)
    return scene.scale_below(knobs.low_res_kernel) if name.endswith(LOW_RES) else scene


@lru_cache(maxsize=256)  # hashing all photographs takes a while
def _fingerprint(config: Config, scene: str, data: Path | None, storage: Path) -> str:
    return field_fingerprint(config, _load_scene(scene, data, storage, config.data))

"""Scores of a refiner during training; the released scoring takes the best of them."""

import json
from pathlib import Path

import torch

from cbnerf.compare.protocols import released_psnr
from cbnerf.config import Config
from cbnerf.data.references import find_references
from cbnerf.data.renders import Renders
from cbnerf.data.scene import Scene
from cbnerf.files import atomic_write_text
from cbnerf.training.checkpoint import REFINER_FILE, Checkpoint, load_checkpoint
from cbnerf.training.evaluation import refine_views
from cbnerf.training.models import build_refiner

RELEASED_PSNR = "psnr_table1"
"""The metric of protocol `table1`."""
_HISTORY_FILE = "table1.json"


class History:
    """A report that scores a refiner at each evaluation as the released code does, and writes the
    PSNR of the best view to a file beside the checkpoint."""

    def __init__(
        self, config: Config, scene: Scene, renders: Renders, folder: Path, device: torch.device
    ):
        self._config, self._scene, self._renders = config, scene, renders
        self._folder, self._device = folder, device

    def __call__(self, step: int, metrics: dict[str, float], checkpoint: Checkpoint, /) -> None:
        refiner = build_refiner(self._config).to(self._device)
        refiner.load_state_dict(checkpoint.model)
        views = list(range(self._scene.num_views))
        references = find_references(self._config, self._scene, self._renders, views)
        refined = refine_views(refiner.eval(), self._renders, self._device, references)
        best = max(map(released_psnr, refined, self._scene.images))
        history = read_history(self._folder) | {step: best}
        atomic_write_text(self._folder / _HISTORY_FILE, json.dumps(history, indent=1))

    def catch_up(self) -> None:
        """Score the last checkpoint, if a crash came between writing and scoring it."""
        path = self._folder / REFINER_FILE
        if path.exists():
            last = load_checkpoint(path, "refiner", self._device)
            if last.step not in read_history(self._folder):
                self(last.step, last.metrics, last)


def read_history(folder: Path) -> dict[int, float]:
    """Released PSNR in dB of the best view at each evaluation, by step."""
    path = folder / _HISTORY_FILE
    if not path.exists():
        return {}
    return {
        int(step): value for step, value in json.loads(path.read_text(encoding="utf-8")).items()
    }

from pathlib import Path

import pytest

from cbnerf.training.checkpoint import Checkpoint, save_checkpoint


class Keep:
    """A report that remembers the metrics and saves the checkpoint of every step."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.metrics: dict[int, dict[str, float]] = {}

    def __call__(self, step: int, metrics: dict[str, float], checkpoint: Checkpoint) -> None:
        self.metrics[step] = metrics
        save_checkpoint(checkpoint, self.folder / f"{step}.pt")


@pytest.fixture
def keep(tmp_path: Path) -> Keep:
    return Keep(tmp_path)

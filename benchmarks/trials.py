"""Trainings of a benchmark, kept in a JSON file as they end, so that the same command resumes."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from cbnerf.files import atomic_write_text

T = TypeVar("T")


def load_trials(file: Path, kind: type[T]) -> list[T]:
    """Trainings of earlier commands, each an object of the dataclass `kind`."""
    if not file.exists():
        return []
    return [kind(**trial) for trial in json.loads(file.read_text(encoding="utf-8"))]


def save_trials(file: Path, trials: Sequence[Any]) -> None:
    atomic_write_text(file, json.dumps([asdict(trial) for trial in trials], indent=1) + "\n")

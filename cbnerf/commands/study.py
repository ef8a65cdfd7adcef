"""Commands that steer a study while it runs or before it resumes (they need cbnerf[search])."""

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from cbnerf.data.library import default_storage


@dataclass(kw_only=True)
class Enqueue:
    """Let a study try a configuration next, also while it runs."""

    study: tyro.conf.Positional[str]
    """Name of the study."""
    settings: tyro.conf.Positional[tuple[str, ...]]
    """`knob=value`, for one knob of its space or more; the sampler proposes the others."""
    storage: Path = field(default_factory=default_storage)
    """The `--storage` of `tune.py`."""

    def run(self) -> None:
        need_optuna()
        from cbnerf.search.steering import enqueue

        if not self.settings:
            raise ValueError("enqueue: name a knob, such as codebook.size=2048")
        queued = enqueue(self.storage, self.study, self.settings)
        print(f"configuration {queued.number} of study {self.study} is next", end="")
        print(f" but {queued.ahead}" if queued.ahead else "")
        if queued.ahead >= queued.left:
            print(
                f"the study may start {queued.left} more configurations; `tune.py --resume --name "
                f"{self.study} --trials NUMBER` extends it"
            )


@dataclass(kw_only=True)
class Suggest:
    """Show what a study tries next, and what the race expects of each of its configurations."""

    study: tyro.conf.Positional[str]
    """Name of the study."""
    count: int = 3
    """Number of proposals."""
    json: bool = False
    """Print JSON."""
    storage: Path = field(default_factory=default_storage)
    """The `--storage` of `tune.py`."""

    def run(self) -> None:
        need_optuna()
        from cbnerf.search.steering import as_text, suggestions

        if self.count < 0:
            raise ValueError("--count must not be negative")
        found = suggestions(self.storage, self.study, self.count)
        print(json.dumps(found, indent=1) if self.json else as_text(found))


def need_optuna() -> None:
    if importlib.util.find_spec("optuna") is None:
        raise ValueError("Optuna is not installed; pip install 'cbnerf[search]'")

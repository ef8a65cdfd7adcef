"""Commands on a storage folder: compare methods, manage the cache, report a study."""

import importlib.util
import math
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

from cbnerf.commands.study import need_optuna
from cbnerf.compare.command import Request, report_folder, settle
from cbnerf.compare.report import write_report
from cbnerf.compare.run import run_comparison
from cbnerf.data.library import default_storage, describe_photographs
from cbnerf.training.distributed import choose_device
from cbnerf.training.store import Store


@dataclass(kw_only=True)
class Compare(Request):
    """Train several methods where needed, score all by one protocol, and write a report."""

    mlflow: bool = False
    """Also log the report to MLflow (needs cbnerf[search])."""

    def run(self) -> None:
        if self.mlflow and importlib.util.find_spec("mlflow") is None:
            raise ValueError("--mlflow: MLflow is not installed; pip install 'cbnerf[search]'")
        comparison = settle(self)
        folder = report_folder(self, comparison)
        if self.mlflow:
            from cbnerf.search.comparison import check_mlflow

            check_mlflow(comparison.storage)
        device = choose_device()
        width = comparison.split.width
        print(f"photographs  {describe_photographs(comparison.scenes, comparison.data, width)}")
        results = run_comparison(comparison, device, lambda line: print(line, flush=True))
        print(write_report(comparison, results, folder, device))
        print(f"\nreport     {folder / 'report.html'}")
        if self.mlflow:
            from cbnerf.search.comparison import log_comparison

            print(f"MLflow     run {log_comparison(folder, comparison.storage)}")


@dataclass(kw_only=True)
class Cache:
    """Manage the trained stages that studies and comparisons share."""

    action: tyro.conf.Positional[Literal["list", "verify", "prune"]]
    """`list` entries, `verify` their checksums, `prune` broken, idle and surplus entries."""
    storage: Path = field(default_factory=default_storage)
    """The `--storage` of `tune.py` and `cbnerf compare`."""
    days: float = math.inf
    """`prune`: remove entries not used for this many days."""
    max_gb: float = math.inf
    """`prune`: remove the least recently used entries down to this total size in gigabytes."""

    def run(self) -> None:
        cache = Store(self.storage / "cache")
        if not cache.folder.is_dir():
            raise ValueError(f"{cache.folder}: no such cache; give the --storage of a study")
        if not (self.days >= 0 and self.max_gb >= 0):
            raise ValueError("--days and --max-gb must be at least 0")
        if self.action == "prune":
            removed = cache.prune(idle_days=self.days, max_bytes=self.max_gb * 1e9)
            for entry in removed:
                print(entry.folder.name)
            gone = sum(entry.num_bytes for entry in removed)
            print(f"{cache.folder}: removed {len(removed)} entries, {gone / 1e6:.1f} MB")
            return
        entries = list(cache.entries(thorough=self.action == "verify"))
        for entry in entries:
            used = datetime.fromtimestamp(entry.last_used)
            print(
                f"{entry.state:<10}  {entry.num_bytes / 1e6:8.1f} MB  "
                f"used {used:%Y-%m-%d %H:%M}  {entry.folder.name}"
            )
        total = sum(entry.num_bytes for entry in entries)
        print(f"{cache.folder}: {len(entries)} entries, {total / 1e6:.1f} MB")
        broken = [entry.folder.name for entry in entries if entry.state == "broken"]
        if broken:
            raise ValueError(
                f"{cache.folder / broken[0]}: its files are not those of its manifest; it will be "
                "trained again when it is needed, or remove it with `cbnerf cache prune`"
            )


@dataclass(kw_only=True)
class Report:
    """Write the report of a study, finished or running (needs cbnerf[search])."""

    study: tyro.conf.Positional[str]
    """Name of the study."""
    watch: bool = False
    """Write it again and again while the study runs; a browser follows. Ctrl-C ends it."""
    every: int = 30
    """Seconds between two pages of --watch."""
    storage: Path = field(default_factory=default_storage)
    """The `--storage` of `tune.py`."""

    def run(self) -> None:
        need_optuna()
        from cbnerf.search.command import report_study, watch_study

        if self.every < 1:
            raise ValueError("--every must be at least 1")
        if self.watch:
            print(watch_study(self.storage, self.study, self.every, partial(print, flush=True)))
        else:
            print(report_study(self.storage, self.study))

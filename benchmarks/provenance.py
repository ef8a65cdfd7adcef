"""The line under every table of figures: when, from what, on what."""

import platform
import shlex
import subprocess
import sys
from datetime import date
from functools import cache
from pathlib import Path

import torch


@cache
def provenance(threads: int) -> str:
    """Command, date, commit, versions and hardware of this run, as one line of Markdown."""
    # Benchmarks that run one after the other leave their results there.
    status = _git("status", "--porcelain", "--untracked-files=no", "--", "..", ":!results")
    commit = _git("rev-parse", "--short", "HEAD") + (" with local changes" if status else "")
    command = shlex.join(["python", *sys.argv])
    return (
        f"`{command}`, {date.today()}, commit {commit}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {_hardware()}, {threads} threads\n"
    )


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    ).stdout.strip()


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

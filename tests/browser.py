"""A page as a real browser shows it: headless Chromium, in a process of its own."""

import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(PROGRAM is None, reason=f"none of {', '.join(NAMES)} is there")


def dump_page(address: str, profile: Path, *options: str, budget: int = 5000) -> str:
    """The page's elements after `budget` ms of its scripts' time."""
    done = subprocess.run(
        [str(PROGRAM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
         f"--virtual-time-budget={budget}", *options, "--dump-dom", address],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    return done.stdout

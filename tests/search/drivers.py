"""A `tune.py` in a process of its own, and the processes of Ray that work for it."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def wait_for(condition: Callable[[], bool], driver: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline, "never came"
        time.sleep(0.01)


def finish(driver: "subprocess.Popen[str]", status: int = 0) -> str:
    """What it said on standard error; a hang ends the test."""
    try:
        output, errors = driver.communicate(timeout=400)
    finally:
        driver.kill()
    assert driver.returncode == status, output + errors
    return errors


def rays_processes() -> dict[int, str]:
    """Title of each process of Ray on this machine, by its number."""
    titles: dict[int, str] = {}
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = file.read_bytes().split(b"\0")[0].decode(errors="replace")
        except OSError:
            continue
        if title.startswith("ray::"):
            titles[int(file.parent.name)] = title
    return titles

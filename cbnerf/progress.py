"""Progress of long loops as lines of the logger `cbnerf`, for terminals and log files alike."""

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

_INTERVAL = 30.0
"""Seconds between two lines."""

Item = TypeVar("Item")


def progress(items: Sequence[Item], label: str) -> Iterator[Item]:
    """Yield the items; every 30 seconds, log how many are done and about how long the rest takes:
    `stage 1 of fern: 1200 of 5600, 4 min left`."""
    started = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - said >= _INTERVAL:
            said = now
            left = time_left(now - started, done, len(items))
            logging.getLogger("cbnerf").info("%s: %d of %d, %s left", label, done, len(items), left)
        yield item


def time_left(elapsed: float, done: int, total: int) -> str:
    """About how long the rest takes, in words; something must be done."""
    return duration(elapsed / done * (total - done))


def duration(seconds: float) -> str:
    """In words: `45 s`, `4 min` or `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def show_progress() -> None:
    """Print the lines of `progress` to standard output."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("cbnerf")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)

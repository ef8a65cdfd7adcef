"""SIGTERM, which a machine sends before it goes: leave with a checkpoint of the last step.

Inside `leaving_at_sigterm` the signal raises `Preempted`; inside `postponed`, and after
`note_sigterm`, it only leaves a note, which whoever postponed it has to heed. Processes that train
together may also be told before, by whom `note_sigterm` names.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class Preempted(SystemExit):
    """The process was told to end; no error that a handler of errors should treat."""

    status = 128 + signal.SIGTERM

    def __init__(self, status: int = status):  # an argument, so that it can be unpickled
        super().__init__(status)


@dataclass
class _Notice:
    has_come: bool = False
    is_postponed: bool = False
    is_announced: Callable[[], bool] = lambda: False
    is_heeded: bool = False


_notice = _Notice()


@contextmanager
def leaving_at_sigterm() -> Iterator[None]:
    """Raise `Preempted` at SIGTERM during a block; outside the main thread, where Python allows no
    handlers, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _notice.has_come = False


def note_sigterm(is_announced: Callable[[], bool]) -> None:
    """From now on SIGTERM only leaves a note, for a training in another thread of this process.

    To be called in the main thread, where Python handles signals. All processes that train together
    call `is_announced` at the same steps; it tells whether one of their machines goes soon.
    """
    _notice.is_announced = is_announced
    _notice.is_postponed = True
    signal.signal(signal.SIGTERM, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    _notice.has_come = True
    if not _notice.is_postponed:
        raise Preempted


@contextmanager
def postponed() -> Iterator[None]:
    """Let a block end although SIGTERM comes; `is_noticed` tells of it afterwards."""
    before, _notice.is_postponed = _notice.is_postponed, True
    try:
        yield
    finally:
        _notice.is_postponed = before


@contextmanager
def heeding() -> Iterator[None]:
    """A training, as a block or a function, that ends soon after `is_noticed`."""
    _notice.is_heeded = True
    try:
        yield
    finally:
        _notice.is_heeded = False


def leave(seconds: float) -> None:
    """Let a training in another thread of this process end as at SIGTERM; returns when it has, or
    after some seconds."""
    _notice.has_come = True
    deadline = time.monotonic() + seconds
    while _notice.is_heeded and time.monotonic() < deadline:
        time.sleep(0.05)


def is_noticed() -> bool:
    """Whether SIGTERM has come in this block of `leaving_at_sigterm`, or since `note_sigterm`."""
    return _notice.has_come


def is_announced() -> bool:
    """Whether a machine of this training goes soon; all its processes must call this."""
    return _notice.is_announced()

"""SIGTERM, which a machine sends before it goes: leave with a checkpoint of the last step.

Inside `leaving_at_sigterm` the signal raises `Preempted`; inside `postponed`, and after
`note_sigterm`, it only leaves a note, which whoever postponed it has to heed.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Preempted(SystemExit):
    """The process was told to end; no error that a handler of errors should treat."""

    status = 128 + signal.SIGTERM

    def __init__(self, status: int = status):  # an argument, so that it can be unpickled
        super().__init__(status)


class _Notice:
    has_come = False
    is_postponed = False


@contextmanager
def leaving_at_sigterm() -> Iterator[None]:
    """Raise `Preempted` at SIGTERM during a block; outside the main thread, where Python allows no
    handlers, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _notice)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _Notice.has_come = False


def note_sigterm() -> None:
    """From now on SIGTERM only leaves a note, for a training in another thread of this process.

    To be called in the main thread, where Python handles signals.
    """
    _Notice.is_postponed = True
    signal.signal(signal.SIGTERM, _notice)


def _notice(number: int, frame: FrameType | None) -> None:
    _Notice.has_come = True
    if not _Notice.is_postponed:
        raise Preempted


@contextmanager
def postponed() -> Iterator[None]:
    """Let a block end although SIGTERM comes; `is_noticed` tells of it afterwards."""
    before, _Notice.is_postponed = _Notice.is_postponed, True
    try:
        yield
    finally:
        _Notice.is_postponed = before


def is_noticed() -> bool:
    """Whether SIGTERM has come in this block of `leaving_at_sigterm`, or since `note_sigterm`."""
    return _Notice.has_come

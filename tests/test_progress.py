import logging
from itertools import count

import pytest

from cbnerf import progress as module
from cbnerf.progress import duration, progress


def test_a_line_every_thirty_seconds_tells_what_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "cbnerf")
    clock = count(0.0, 20.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    assert list(progress(range(6), "stage 1 of fern")) == list(range(6))
    # The clock says 0 at the start and 20, 40, ... 120 before the items.
    assert caplog.messages == [
        "stage 1 of fern: 1 of 6, 3 min left",
        "stage 1 of fern: 3 of 6, 80 s left",
        "stage 1 of fern: 5 of 6, 24 s left",
    ]


def test_short_loops_log_nothing(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "cbnerf")
    assert list(progress([], "nothing")) == [] and list(progress("ab", "letters")) == ["a", "b"]
    assert caplog.messages == []


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.4, "0 s"),
        (89.0, "89 s"),
        (90.0, "2 min"),
        (5399.0, "90 min"),
        (5400.0, "1.5 h"),
        (1e5, "27.8 h"),
    ],
)
def test_durations_in_words(seconds: float, text: str):
    assert duration(seconds) == text

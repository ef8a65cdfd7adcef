"""Repeated calls in another thread."""

import threading
import time

import pytest
from mlflow.exceptions import MlflowException

from cbnerf.search.periodic import repeated

pytestmark = pytest.mark.search


def test_sync_is_repeated_in_another_thread_and_at_the_end():
    threads: list[int] = []
    with repeated(lambda: threads.append(threading.get_ident()), seconds=0.01):
        while len(threads) < 3:
            time.sleep(0.01)
        before = len(threads)
    assert len(threads) > before and threading.get_ident() not in threads


def test_an_error_that_passes_is_printed_and_one_that_stays_is_raised(
    capsys: pytest.CaptureFixture[str],
):
    calls: list[int] = []

    def sync() -> None:
        calls.append(1)
        if len(calls) < 4:
            raise MlflowException("no server at http://me:secret@host\nstatement")

    with repeated(sync, seconds=0.01):
        while len(calls) < 5:
            time.sleep(0.01)
    output = capsys.readouterr().out
    assert output == "  MLflow: no server at http://host; trying again\n"
    with pytest.raises(ZeroDivisionError), repeated(lambda: divmod(1, 0), seconds=60.0):
        pass


def test_a_failing_search_does_not_wait_for_a_sync_that_hangs():
    go = threading.Event()
    with pytest.raises(KeyboardInterrupt), repeated(go.wait, seconds=0.01, patience=0.1):
        time.sleep(0.05)
        raise KeyboardInterrupt
    go.set()

"""The writer's promises: order, no waiting, no silent errors."""

import threading
import time

import pytest

from cbnerf.search.writer import Writer

pytestmark = pytest.mark.search


def test_calls_are_made_in_their_order_by_another_thread():
    made: list[tuple[int, int]] = []
    with Writer() as write:
        for number in range(50):
            write(lambda n: made.append((n, threading.get_ident())), number)
    assert [number for number, _ in made] == list(range(50))
    assert {thread for _, thread in made}.isdisjoint({threading.get_ident()})


def test_waiting_ends_when_all_calls_are_made_or_one_fails():
    made: list[int] = []
    with pytest.raises(ZeroDivisionError), Writer() as write:
        for number in range(5):
            write(made.append, number)
        write.wait()
        assert made == list(range(5)) and len(write) == 0
        write(lambda: 1 / 0)
        write.wait()


def test_the_caller_does_not_wait_until_the_limit():
    go = threading.Event()
    with Writer(limit=3) as write:
        for _ in range(3):
            write(go.wait)
        assert len(write) == 3
        threading.Timer(0.2, go.set).start()
        started = time.monotonic()
        write(int)  # waits for the first
        assert time.monotonic() - started > 0.1
    assert len(write) == 0


def test_an_error_comes_out_at_the_end():
    with pytest.raises(ZeroDivisionError), Writer() as write:
        write(divmod, 1, 0)


def test_an_error_comes_out_at_a_later_call():
    with pytest.raises(ZeroDivisionError), Writer() as write:
        write(divmod, 1, 0)
        while len(write):
            time.sleep(0.01)
        write(int)
        pytest.fail("the second call said nothing")


def test_what_waits_when_the_block_fails_is_dropped_after_some_patience():
    go, made = threading.Event(), []
    with pytest.raises(KeyboardInterrupt), Writer(patience=0.1) as write:
        write(go.wait)
        write(made.append, 1)
        raise KeyboardInterrupt
    go.set()
    time.sleep(0.1)
    assert not made

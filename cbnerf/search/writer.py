"""Writing without waiting: calls that one thread makes in their order."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any


class Writer:
    """Makes calls one after the other in a thread of its own.

    At the end of a `with` block it waits for all of them; if that ends with an error, for
    `patience` seconds at most, and drops the rest. A call's error comes out at a later call or at
    the end.
    """

    def __init__(self, *, limit: int = 10_000, patience: float = 30.0):
        """With `limit` calls waiting, the next one waits, too."""
        self._limit, self._patience = limit, patience
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._waiting: deque[Future[Any]] = deque()

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> None:
        while self._waiting and (self._waiting[0].done() or len(self._waiting) >= self._limit):
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(function, *arguments))

    def __len__(self) -> int:
        """Calls that have not been made yet."""
        return sum(not call.done() for call in self._waiting)

    def wait(self) -> None:
        """Wait until all calls have been made."""
        while self._waiting:
            self._waiting.popleft().result()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *about: Any) -> None:
        patience = None if kind is None else self._patience
        try:
            done, _ = wait(self._waiting, patience, return_when=FIRST_EXCEPTION)
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)
        if kind is None:
            for call in done:
                call.result()

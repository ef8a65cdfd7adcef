"""Write to MLflow while a search runs: repeated calls in another thread."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from cbnerf.search.mlflow_store import first_line


@contextmanager
def repeated(
    sync: Callable[[], None], *, seconds: float = 5.0, patience: float = 30.0
) -> Iterator[None]:
    """Call `sync` every few seconds in a thread, and once more at the end of the block.

    An error of the last call is raised. Of several failed calls in a row before it, the first error
    is printed. If the block raises, the last call is abandoned after `patience` seconds.
    """
    is_over = threading.Event()
    error: Exception | None = None

    def run() -> None:
        nonlocal error
        is_last = False
        while not is_last:
            is_last = is_over.wait(seconds)
            try:
                sync()
                error = None
            except Exception as problem:
                if error is None and not is_last:
                    tqdm.write(f"  MLflow: {first_line(problem)}; trying again")
                error = problem

    thread = threading.Thread(target=run, name="MLflow", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        is_over.set()
        thread.join(patience)
        raise
    is_over.set()
    thread.join()
    if error is not None:
        raise error

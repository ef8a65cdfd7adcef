"""Splits of views into training, validation and test."""

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import NamedTuple

from cbnerf.config import DataConfig

MIN_TRAINING_VIEWS = 2
"""Depth cannot be learned from one view."""


class Split(NamedTuple):
    """Indices of views; the lists are disjoint."""

    train: list[int]
    val: list[int]
    test: list[int]


def split_views(num_views: int, data: DataConfig) -> Split:
    """Protocol `holdout`: every n-th view from index 0 is test, and those half-way between are val.

    With `data.test_every` = 0 all views train (protocol `table1`). ValueError for too few views.
    """
    check_views(num_views, data)
    return _split(num_views, data)


def check_views(
    num_views: int,
    data: DataConfig,
    where: str = "",
    spell: Callable[[str, int], str] = "{} = {}".format,
) -> None:
    """ValueError for too few views to train on, or with `data.validation` to select on.

    `where` names the scene, and `spell` formats a knob and its value as the command takes it.
    """
    if _is_enough(num_views, data):
        return
    every = data.test_every
    mends = [f"give at least {next(n for n in count() if _is_enough(n, data))}"]
    # From twice the number of views on, no view is half-way between test views.
    others = [replace(data, test_every=other) for other in range(3, 2 * num_views)]
    fitting = [other.test_every for other in others if _is_enough(num_views, other)]
    if fitting:
        nearest = min(fitting, key=lambda other: abs(other - every))
        mends.append(f"set {spell('data.test_every', nearest)}")
    selecting = ", or none to select on" if data.validation else ""
    raise ValueError(
        f"{where}{': ' if where else ''}of {num_views} photographs data.test_every = {every} "
        f"leaves fewer than {MIN_TRAINING_VIEWS} to train on{selecting}; {', or '.join(mends)}"
    )


def _split(num_views: int, data: DataConfig) -> Split:
    every = data.test_every
    if every == 0:
        return Split(list(range(num_views)), [], [])
    test = list(range(0, num_views, every))
    val = list(range(every // 2, num_views, every)) if data.validation else []
    train = [view for view in range(num_views) if view not in test and view not in val]
    return Split(train, val, test)


def _is_enough(num_views: int, data: DataConfig) -> bool:
    split = _split(num_views, data)
    selects = bool(split.val) or not data.validation
    return len(split.train) >= MIN_TRAINING_VIEWS and selects

"""Which views train, which select, which score."""

from typing import NamedTuple

from cbnerf.config import DataConfig


class Split(NamedTuple):
    """Indices of views; no view stands in two lists."""

    train: list[int]
    val: list[int]
    test: list[int]


def split_views(num_views: int, data: DataConfig) -> Split:
    """Protocol `holdout`: every n-th view from index 0 is test, those half-way between are val.

    With `data.test_every` = 0 all views train and none is left to score (protocol `table1`).
    """
    every = data.test_every
    if every == 0:
        return Split(list(range(num_views)), [], [])
    test = list(range(0, num_views, every))
    val = list(range(every // 2, num_views, every)) if data.validation else []
    train = [view for view in range(num_views) if view not in test and view not in val]
    if not train or (data.validation and not val):
        raise ValueError(
            f"data.test_every = {every} leaves no view of {num_views} to train on, or none to "
            "select on; give more photographs, another value, or data.validation = false"
        )
    return Split(train, val, test)

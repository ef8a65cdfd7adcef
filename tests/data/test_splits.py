import re
from dataclasses import replace

import pytest

from cbnerf.config import DataConfig
from cbnerf.data.splits import check_views, split_views


@pytest.mark.parametrize(
    "every, validation", [(2, False), (3, True), (3, False), (8, True), (8, False)]
)
@pytest.mark.parametrize("num_views", [10, 20, 33])
def test_every_view_has_one_place(num_views: int, every: int, validation: bool):
    split = split_views(num_views, DataConfig(test_every=every, validation=validation))
    assert sorted(split.train + split.val + split.test) == list(range(num_views))
    assert split.test == [view for view in range(num_views) if view % every == 0]
    assert bool(split.val) == validation
    assert split.train == sorted(split.train)


def test_validation_views_lie_between_test_views():
    split = split_views(20, DataConfig())
    assert (split.test, split.val) == ([0, 8, 16], [4, 12])


def test_validation_does_not_move_the_test_views():
    with_val, without = (split_views(20, DataConfig(validation=v)) for v in (True, False))
    assert with_val.test == without.test
    assert sorted(with_val.train + with_val.val) == without.train


@pytest.mark.parametrize(
    "num_views, knobs, mend",
    [
        (1, {}, "give at least 5"),
        (3, {}, "give at least 5"),
        (4, {}, "give at least 5, or set data.test_every = 7"),
        (5, {"test_every": 3}, "give at least 6, or set data.test_every = 4"),
        (2, {"validation": False}, "give at least 3"),
        (20, {"test_every": 100}, "give at least 51, or set data.test_every = 39"),
        (1, {"test_every": 0, "validation": False}, "give at least 2"),
    ],
)
def test_too_few_views_are_refused_with_what_would_do(num_views: int, knobs: dict, mend: str):
    data = DataConfig(**knobs)
    message = f"of {num_views} photographs data.test_every = {data.test_every} leaves fewer than 2"
    with pytest.raises(ValueError, match=f"^{message}.*; {mend}$"):
        split_views(num_views, data)


@pytest.mark.parametrize("validation", [False, True])
def test_the_mend_mends(validation: bool):
    """Every number of views and every split: what is advised is accepted."""
    for num_views in range(1, 12):
        for every in range(3, 14):
            data = DataConfig(test_every=every, validation=validation)
            try:
                split_views(num_views, data)
            except ValueError as error:
                advice = re.findall(r"at least (\d+)|test_every = (\d+)", str(error).split(";")[1])
                assert advice
                for more, other in advice:
                    views = int(more) if more else num_views
                    split_views(views, data if more else replace(data, test_every=int(other)))


def test_a_command_spells_the_remedy_as_it_takes_it():
    with pytest.raises(ValueError, match=r"^fern: of 4 .*, or set --data.test_every 7$"):
        check_views(4, DataConfig(), "fern", "--{} {}".format)


def test_nothing_is_held_out_where_all_views_train():
    split = split_views(5, DataConfig(test_every=0, validation=False))
    assert split == ([0, 1, 2, 3, 4], [], [])

import pytest

from cbnerf.config import DataConfig
from cbnerf.data.splits import split_views


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


@pytest.mark.parametrize("num_views, every", [(1, 8), (4, 8), (20, 2)])
def test_too_few_views_are_refused(num_views: int, every: int):
    with pytest.raises(
        ValueError, match=f"test_every = {every} leaves no view of {num_views} to train on"
    ):
        split_views(num_views, DataConfig(test_every=every))


def test_nothing_is_held_out_where_all_views_train():
    split = split_views(5, DataConfig(test_every=0, validation=False))
    assert split == ([0, 1, 2, 3, 4], [], [])

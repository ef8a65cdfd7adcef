import pytest
import torch

from cbnerf.rng import Rng

CPU = torch.device("cpu")


def draw(rng: Rng, rows: int) -> list[torch.Tensor]:
    """All kinds one after the other, as training does."""
    return [rng.uniform(rows, 3), rng.integers(100, rows), rng.normal(rows, 2, 2)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_rows_of_all_processes_are_those_of_one(world_size: int):
    whole = draw(Rng(5, 7, CPU), 6)
    ranks = [Rng(5, 7, CPU, rank=rank, world_size=world_size) for rank in range(world_size)]
    parts = zip(*(draw(rng, 6 // world_size) for rng in ranks), strict=True)
    for together, alone in zip(map(torch.cat, parts), whole, strict=True):
        assert torch.equal(together, alone)


def test_a_step_can_be_drawn_again_and_others_differ():
    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    drawn = [Rng(seed, step, CPU).uniform(50) for seed, step in places]
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == len(places)
    assert torch.equal(Rng(1, 1, CPU).uniform(50), drawn[-1])


def test_consecutive_draws_differ_and_have_their_distribution():
    rng = Rng(0, 0, CPU)
    first, second = rng.uniform(20_000), rng.uniform(20_000)
    assert not torch.equal(first, second)
    assert 0 <= first.min() and first.max() < 1
    assert first.mean() == pytest.approx(0.5, abs=0.01)
    normal = rng.normal(20_000)
    assert (normal.mean(), normal.std()) == pytest.approx((0, 1), abs=0.03)
    assert rng.integers(3, 1000).unique().tolist() == [0, 1, 2]

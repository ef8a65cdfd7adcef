import pytest
import torch

from cbnerf.codebook.health import CodebookHealth, count_codes, perplexity, used_share


def test_perplexity_and_used_share_in_closed_form():
    counts = count_codes(torch.tensor([[0, 1], [2, 3]]), 8)
    assert counts.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert perplexity(counts).item() == pytest.approx(4.0)
    assert used_share(counts).item() == 0.5
    # Shares 3/4 and 1/4: exp(H) = 4 / 3^(3/4).
    assert perplexity(torch.tensor([0, 3, 1])).item() == pytest.approx(4 / 3**0.75)


def test_agreement_counts_places():
    health = CodebookHealth(5)
    health.add(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2], [4, 4]]))
    assert health.metrics()["codebook/agreement"] == 0.75
    assert health.sr_counts.tolist() == [0, 1, 1, 0, 2]


def test_renders_may_be_looked_up_at_every_second_place():
    health = CodebookHealth(5)
    high_res = torch.tensor([[[1, 0, 2, 0], [0, 0, 0, 0], [3, 0, 4, 0], [0, 0, 0, 0]]])
    health.add(high_res, torch.tensor([[[1, 2], [4, 4]]]))
    assert health.metrics()["codebook/agreement"] == 0.75
    assert health.high_res_counts.tolist() == [12, 1, 1, 1, 1]


def test_batches_add_up_to_one_large_batch_until_cleared():
    high_res, sr = torch.randint(20, (2, 6, 5, 10), generator=torch.Generator().manual_seed(0))
    together, apart = (CodebookHealth(20) for _ in range(2))
    together.add(high_res, sr)
    for batch in range(6):
        apart.add(high_res[batch], sr[batch])
    assert apart.metrics() == together.metrics()
    apart.clear()
    apart.add(high_res[0], sr[0])
    together = CodebookHealth(20)
    together.add(high_res[0], sr[0])
    assert apart.metrics() == together.metrics()


def test_without_batches_there_is_nothing_to_tell():
    health = CodebookHealth(5)
    assert health.metrics() == {}
    health.add(torch.tensor([[1]]), torch.tensor([[1]]))
    assert health.metrics() != {}
    health.clear()
    assert health.metrics() == {}

import pytest
import torch

from cbnerf.codebook.nearest import _can_skip, _find_least_several, find_nearest, find_neighbours


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("max_distances", [1, 100, 2**24])
def test_search_finds_the_explicit_minimum(max_distances: int):
    latents, codes = draw(53, 5), draw(31, 5, seed=2)
    obvious = [min(range(31), key=lambda i: ((z - codes[i]) ** 2).sum().item()) for z in latents]
    assert find_nearest(latents, codes, max_distances).tolist() == obvious


def test_search_in_chunks_is_exact():
    latents, codes = draw(3000, 64), draw(700, 64, seed=2)
    distances = torch.cdist(latents.double(), codes.double())
    indices = find_nearest(latents, codes, 10_000)
    chosen = distances.gather(1, indices[:, None])[:, 0]
    # Where two codes lie equally far in float32, either will do.
    torch.testing.assert_close(chosen, distances.min(1).values, rtol=1e-6, atol=0)
    assert torch.equal(indices, find_nearest(latents, codes, 10**9))


@pytest.mark.parametrize("max_distances", [1, 100, 2**24])
@pytest.mark.parametrize("number", [1, 3, 30])
def test_neighbours_are_the_nearest_by_an_explicit_search(number: int, max_distances: int):
    latents, codes = draw(53, 5), draw(31, 5, seed=2)
    found = find_neighbours(latents, codes, number, max_distances)
    for latent, indices, shares in zip(latents, *found, strict=True):
        distances = [((latent - code) ** 2).sum().item() for code in codes]
        nearest = sorted(range(31), key=distances.__getitem__)
        assert indices.tolist() == nearest[:number]
        nearness = torch.tensor([distances[nearest[number]] - distances[i] for i in indices])
        torch.testing.assert_close(shares, nearness / nearness.sum(), rtol=1e-3, atol=1e-5)


def test_one_neighbour_is_the_nearest_code_alone():
    latents, codes = draw(200, 8), draw(64, 8, seed=2)
    indices, shares = find_neighbours(latents, codes, 1)
    assert torch.equal(indices[:, 0], find_nearest(latents, codes))
    assert torch.equal(shares, torch.ones(200, 1))


def test_no_code_comes_or_goes_at_once():
    codes, values = draw(64, 4), draw(64, seed=2)
    between = torch.linspace(0, 1, 5000)[:, None]
    path = torch.lerp(draw(4, seed=3), draw(4, seed=4), between)

    def greatest_jump(number: int) -> float:
        indices, shares = find_neighbours(path, codes, number)
        return float((values[indices] * shares).sum(1).diff().abs().max())

    assert greatest_jump(3) < 0.02 < 0.3 < greatest_jump(1)


def test_codes_that_lie_equally_far_share_equally():
    codes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    assert find_neighbours(torch.zeros(1, 2), codes, 2).shares.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("number", [1, 2, 4])
def test_gradients_of_shares_match_finite_differences(number: int):
    latents, codes = (draw(*shape).double().requires_grad_() for shape in ((7, 3), (9, 3)))
    indices = find_neighbours(latents, codes, number).indices

    def shares(latents: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        found = find_neighbours(latents, codes, number)
        assert torch.equal(found.indices, indices)  # steps are small
        return found.shares

    assert torch.autograd.gradcheck(shares, (latents, codes))
    if number > 1:
        total = (torch.arange(number) * shares(latents, codes)).sum()
        to_latents, to_codes = torch.autograd.grad(total, [latents, codes])
        assert to_latents.abs().amax(1).min() > 0 and to_codes.abs().max() > 0


def test_gradients_of_shares_are_finite_where_codes_coincide():
    codes = torch.zeros(5, 3, requires_grad=True)
    latents = torch.zeros(2, 3, requires_grad=True)
    found = find_neighbours(latents, codes, 3)
    torch.testing.assert_close(found.shares, torch.full((2, 3), 1 / 3))
    for gradient in torch.autograd.grad(found.shares[:, 0].sum(), [latents, codes]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("columns", [31, 256, 2047, 2048, 4096])
@pytest.mark.parametrize("number", [1, 4, 17])
def test_the_least_of_many_columns_are_those_of_a_sort(number: int, columns: int):
    # Integers are distinct in a row, so there is one right order.
    values = torch.rand(50, columns, generator=torch.Generator().manual_seed(1)).argsort(1).float()
    found = _find_least_several(values, number)
    assert torch.equal(found, values.argsort(dim=1)[:, :number])


def test_the_least_columns_may_lie_in_one_group():
    """Groups are every 256th column of 4096."""
    values = torch.ones(1, 4096)
    values[0, 5::256] = torch.arange(-16.0, 0.0)
    values[0, 6] = -0.5
    expected = [*range(5, 4096, 256), 6]
    assert _find_least_several(values, 17)[0].tolist() == expected


@pytest.fixture
def both_searches(monkeypatch: pytest.MonkeyPatch):
    """Runs a search with the kernel and without it."""
    pytest.importorskip("numba")

    def run(search, latents: torch.Tensor, codes: torch.Tensor, *more: int):
        assert _can_skip(latents, codes)
        with_kernel = search(latents, codes, *more)
        with monkeypatch.context() as patch:
            patch.setattr("cbnerf.kernels.HAS_NUMBA", False)
            assert not _can_skip(latents, codes)
            return with_kernel, search(latents, codes, *more)

    return run


def draw_flat(rows: int, seed: int, dim: int = 21) -> torch.Tensor:
    """Latents whose last three dimensions, out of order, hold most of the variance."""
    spreads = torch.tensor([0.5] * 18 + [3.0, 9.0, 6.0])
    return draw(rows, dim, seed=seed) * spreads[-dim:]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [256, 300, 1000])
@pytest.mark.parametrize("number, dim", [(1, 21), (4, 21), (4, 2)])
def test_the_kernel_finds_what_all_distances_say(
    size: int, number: int, dim: int, threads: int, both_searches, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    latents, codes = draw_flat(777, seed=1, dim=dim), draw_flat(size, seed=2, dim=dim)
    found, expected = both_searches(find_neighbours, latents, codes, number)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.shares, expected.shares)
    nearest, expected = both_searches(find_nearest, latents, codes)
    assert torch.equal(nearest, expected) and torch.equal(nearest, found.indices[:, 0])


def test_the_kernel_is_right_behind_latents_that_are_not_finite(both_searches):
    latents, codes = draw_flat(500, seed=1), draw_flat(300, seed=2)
    latents[::7] = torch.nan
    latents[3::7] = torch.inf
    finite = latents.isfinite().all(1)
    found, expected = both_searches(find_neighbours, latents, codes, 3)
    assert torch.equal(found.indices[finite], expected.indices[finite])
    assert (found.indices[~finite] == 0).all()


def test_the_kernel_finds_each_of_equal_codes_once(both_searches):
    codes = draw_flat(64, seed=2).repeat(5, 1)
    found, _ = both_searches(find_neighbours, draw_flat(400, seed=1), codes, 5)
    assert all(len(set(row)) == 5 for row in found.indices.tolist())
    assert (found.indices % 64 == found.indices[:, :1] % 64).all()


def test_codes_that_spread_in_many_dimensions_are_searched_by_all_distances():
    assert not _can_skip(draw(1000, 21), draw(1000, 21, seed=2))
    assert not _can_skip(draw_flat(10, seed=1), draw_flat(1000, seed=2))  # few latents

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cbnerf.codebook.filters import CodeFilters, Corrections
from cbnerf.codebook.nearest import Neighbours
from cbnerf.codebook.views import MadeOnDemand


def draw_codes(codes: int, height: int, width: int, neighbours: int = 1) -> Neighbours:
    """Random codes of each pixel, no two alike, with random shares."""
    indices = torch.rand(height, width, codes).argsort(dim=-1)[..., :neighbours]
    return Neighbours(indices, torch.rand(height, width, neighbours).softmax(-1))


def draw_views(
    filters: CodeFilters, count: int, noise: float = 0.0, seed: int = 0, neighbours: int = 1
) -> list[Corrections]:
    """Random renders with random codes, and what these filters make of them."""
    torch.manual_seed(seed)
    views = []
    for _ in range(count):
        sr, codes = torch.rand(3, 24, 20), draw_codes(len(filters.table), 24, 20, neighbours)
        wanted = filters(sr, codes) + noise * torch.randn(3, 24, 20)
        views.append(Corrections(sr, codes, wanted))
    return views


def make_filters(codes: int, scale: float = 0.05) -> CodeFilters:
    torch.manual_seed(1)
    filters = CodeFilters(codes)
    filters.table.normal_(std=scale)
    return filters


def error(filters: CodeFilters, views: list[Corrections]) -> float:
    errors = [(filters(v.sr, v.codes) - v.target).square().mean().item() for v in views]
    return sum(errors) / len(errors)


@pytest.mark.parametrize("neighbours", [1, 3])
@pytest.mark.parametrize("kernel", [True, False])
def test_filters_correct_by_the_pixels_around(
    kernel: bool, neighbours: int, monkeypatch: pytest.MonkeyPatch
):
    if kernel:
        pytest.importorskip("numba")
    monkeypatch.setattr("cbnerf.kernels.HAS_NUMBA", kernel)
    filters = make_filters(5)
    sr, codes = torch.rand(3, 9, 11), draw_codes(5, 9, 11, neighbours)
    corrected = filters(sr, codes)
    padded = F.pad(sr[None], (3,) * 4, mode="replicate")[0]
    for row, column in ((0, 0), (4, 7), (8, 10)):
        around = padded[:, row : row + 7, column : column + 7].movedim(0, -1).flatten()
        expected = torch.zeros(3)
        for index, share in zip(codes.indices[row, column], codes.shares[row, column], strict=True):
            own = filters.table[index]
            expected += share * (around @ own[:-1] + own[-1])
        torch.testing.assert_close(corrected[:, row, column], expected)


def test_unfitted_filters_correct_nothing():
    assert CodeFilters(4)(torch.rand(3, 8, 8), draw_codes(4, 8, 8, 2)).count_nonzero() == 0


def test_the_filters_that_made_the_corrections_are_found():
    true = make_filters(2)
    views = draw_views(true, 12)
    found = CodeFilters(2)
    found.fit(views, ridge=10.0)
    nothing = CodeFilters(2)
    test = draw_views(true, 2, seed=5)
    assert error(found, test) < 0.02 * error(nothing, test)


def test_strong_ridge_gives_all_codes_the_common_filter():
    one = make_filters(1)
    true = CodeFilters(50)
    true.table.copy_(one.table.expand(50, -1, -1))
    views = draw_views(true, 12, noise=1.0)
    found = CodeFilters(50)
    found.fit(views, ridge=1e5)
    assert (found.table - found.table.mean(0)).std() < 0.1 * found.table.std()


@pytest.mark.parametrize("neighbours, ridge", [(1, 30.0), (2, 30.0), (2, 1e3)])
def test_fit_is_ridge_regression_towards_the_common_filter(neighbours: int, ridge: float):
    views = draw_views(make_filters(3), 4, noise=0.1, neighbours=neighbours)
    found = CodeFilters(3)
    found.fit(views, ridge)
    rows, shares, wanted = (torch.cat(part) for part in zip(*map(unfold, views), strict=True))
    ones = torch.eye(148, dtype=torch.float64)
    gram, moments = rows.T @ rows / len(rows) + 1e-5 * ones, rows.T @ wanted / len(rows)
    for code in range(3):
        own = rows * shares[:, code, None]
        expected = torch.linalg.solve(
            own.T @ rows + ridge * gram, own.T @ wanted + ridge * moments
        )  # fmt: skip
        torch.testing.assert_close(found.table[code].double(), expected, atol=1e-3, rtol=0)


def unfold(view: Corrections) -> tuple[Tensor, Tensor, Tensor]:
    """Of each pixel what is around it, the share of each of three codes, what is wanted."""
    padded = F.pad(view.sr[None], (3,) * 4, mode="replicate")
    rows = F.unfold(padded, 7)[0].unflatten(0, (3, 49)).movedim(0, 1).flatten(0, 1).T.double()
    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
    indices, shares = (part.flatten(0, 1) for part in view.codes)
    dense = torch.zeros(len(rows), 3).scatter(1, indices, shares).double()
    return rows, dense, view.target.flatten(1).T.double()


def test_shares_are_heeded_when_filters_are_fitted():
    true = make_filters(6)
    views = draw_views(true, 30, neighbours=3)
    found, heedless = CodeFilters(6), CodeFilters(6)
    found.fit(views, 30.0)
    whole = torch.ones(24, 20, 1)
    alone = [v._replace(codes=Neighbours(v.codes.indices[..., :1], whole)) for v in views]
    heedless.fit(alone, 30.0)
    test = draw_views(true, 2, seed=5, neighbours=3)
    assert error(found, test) < error(heedless, test) < error(CodeFilters(6), test)


@pytest.mark.parametrize("codes", [1, 6])
def test_a_code_that_nobody_met_has_the_common_filter(codes: int):
    views = draw_views(make_filters(codes), 4)
    found = CodeFilters(codes + 1)
    found.fit(views, 30.0)
    alone = CodeFilters(1)
    first = Neighbours(torch.zeros(24, 20, 1, dtype=torch.int64), torch.ones(24, 20, 1))
    everywhere = [view._replace(codes=first) for view in views]
    alone.fit(everywhere, 30.0)
    torch.testing.assert_close(found.table[codes], alone.table[0], atol=2e-3, rtol=0)


class Alive(TorchDispatchMode):
    """Notes the most bytes that the tensors made in it held at a time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        # The object in Python stays the same for as long as a tensor has the storage.
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def test_bytes_alive_are_counted():
    with Alive() as alive:
        first = torch.zeros(1000)
        view = first[1:]
        del first
        assert (alive.now, alive.peak) == (4000, 4000)
        del view
        torch.ones(10)
    assert (alive.now, alive.peak) == (0, 4000)


def fit_streamed(views: Sequence[Corrections]) -> Tensor:
    """With a view at a time held."""
    found = CodeFilters(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cbnerf.codebook.filters._HELD", 0)
        patch.setattr("cbnerf.codebook.filters._GROUP", 1)
        patch.setattr("cbnerf.codebook.filters._CODES_SUMMED", 2)
        found.fit(views, 30.0)
    return found.table


def test_views_one_at_a_time_give_the_same_filters():
    views = draw_views(make_filters(3), 6, noise=0.1, neighbours=2)
    held = CodeFilters(3)
    held.fit(views, 30.0)
    torch.testing.assert_close(fit_streamed(views), held.table, atol=1e-4, rtol=0)


def test_memory_does_not_grow_with_the_number_of_views():
    def make(number: int) -> Corrections:
        (view,) = draw_views(true, 1, noise=0.1, seed=number, neighbours=3)
        return view

    true = make_filters(3)
    peaks, held = [], []
    for count in (4, 32):
        views = MadeOnDemand(make, range(count))
        for hold, found in ((False, peaks), (True, held)):
            with pytest.MonkeyPatch.context() as patch, Alive() as alive:
                patch.setattr("cbnerf.codebook.filters._HELD", 10**9 if hold else 0)
                patch.setattr("cbnerf.codebook.filters._GROUP", 1)
                CodeFilters(3).fit(views, 30.0)
            found.append(alive.peak)
    assert peaks[1] < 1.02 * peaks[0]
    assert held[1] > held[0] + 28 * 24 * 20 * 4 * 3  # the counter sees what is held

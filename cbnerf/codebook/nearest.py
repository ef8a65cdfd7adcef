"""The nearest codes of latents: one, or several with weights.

A *codebook* is a `[codes dim]` matrix, a *code* is one row, an *index* is a row number; distances
are Euclidean. Searches are exact: on a CPU by a kernel that skips most codes where that pays, else
by all distances, a chunk at a time.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cbnerf.kernels import has_kernels

# Distances per chunk of a search: few enough for a CPU's caches, enough to keep a GPU busy.
_CPU_DISTANCES, _GPU_DISTANCES = 2**20, 2**24
_PARTS, _MANY = 8, 256  # fewer codes are searched without parts, and without the kernel
_TOGETHER = 16  # columns whose common minimum decides whether they are sorted
_ROWS = 2**12  # latents whose shares are computed at once


class Neighbours(NamedTuple):
    """The nearest codes of latents, nearest first."""

    indices: Int[Tensor, "*batch neighbours"]
    shares: Float[Tensor, "*batch neighbours"]
    """Weights; they sum to one."""


def rank_codes(
    latents: Float[Tensor, "rows dim"], codes: Float[Tensor, "codes dim"]
) -> Float[Tensor, "rows codes"]:
    """Squared distances to all codes, minus the squared norm of the latent (same order)."""
    with torch.autocast(latents.device.type, enabled=False):
        return append_ones(latents) @ _columns(codes)


def append_ones(latents: Tensor) -> Tensor:
    return torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1)


def _columns(codes: Tensor) -> Tensor:
    """[-2 code, |code|^2]: one product with [latent, 1] ranks the codes; `addmm` would copy the
    norms to every row."""
    return torch.cat([-2 * codes, codes.square().sum(1, keepdim=True)], dim=1).T


@torch.no_grad()
def find_nearest(
    latents: Float[Tensor, "rows dim"],
    codes: Float[Tensor, "codes dim"],
    max_distances: int | None = None,
) -> Int[Tensor, " rows"]:
    """Index of the nearest code of each latent; computes `max_distances` distances at a time."""
    if _can_skip(latents, codes):
        return _find_skipping(latents, codes, 1)[:, 0]
    rows, columns = rows_at_once(latents, len(codes), max_distances), _columns(codes)
    indices = torch.empty(len(latents), dtype=torch.int64, device=latents.device)
    # One buffer for all chunks: reallocation would fragment the heap.
    buffer = latents.new_empty(min(rows, len(latents)), len(codes))
    with torch.autocast(latents.device.type, enabled=False):
        for chunk, found in zip(latents.split(rows), indices.split(rows), strict=True):
            distances = torch.mm(append_ones(chunk), columns, out=buffer[: len(chunk)])
            found.copy_(_find_least(distances))
    return indices


def find_neighbours(
    latents: Float[Tensor, "rows dim"],
    codes: Float[Tensor, "codes dim"],
    number: int,
    max_distances: int | None = None,
) -> Neighbours:
    """The `number` nearest codes of each latent; there must be more codes than that.

    Shares are proportional to d - d_i, where d_i is the squared distance to the i-th nearest code
    and d that to the first code left out. They are continuous in the latent: a code enters or
    leaves with share 0. Squared distances 1, 2, 4 and `number` 2 give shares 3/5, 2/5. Shares have
    a gradient to latents and codes.
    """
    indices = _find_several(latents, codes, number + 1, max_distances)
    rows = _ROWS if latents.device.type == "cpu" else max(len(latents), 1)
    parts = zip(latents.split(rows), indices.split(rows), strict=True)
    return Neighbours(indices[:, :-1], torch.cat([_share(some, codes, own) for some, own in parts]))


def _share(latents: Tensor, codes: Tensor, indices: Tensor) -> Tensor:
    """Shares of all codes but the last one."""
    distances = (latents[:, None] - F.embedding(indices, codes)).square().sum(-1)
    nearness = distances[:, -1:] - distances[:, :-1]
    nearness = nearness.clamp_min(torch.finfo(distances.dtype).tiny)
    return nearness / nearness.sum(dim=1, keepdim=True)


@torch.no_grad()
def _find_several(
    latents: Float[Tensor, "rows dim"],
    codes: Float[Tensor, "codes dim"],
    number: int,
    max_distances: int | None,
) -> Int[Tensor, "rows number"]:
    if _can_skip(latents, codes):
        return _find_skipping(latents, codes, number)
    chunks = latents.split(rows_at_once(latents, len(codes), max_distances))
    return torch.cat([_find_least_several(rank_codes(some, codes), number) for some in chunks])


def _can_skip(latents: Tensor, codes: Tensor) -> bool:
    """Whether to search with the kernel: it skips codes if three dimensions, such as positions,
    hold most of their variance, and its preparation costs as much as a search of few latents."""
    is_large = len(codes) >= _MANY and len(latents) >= len(codes) // 4
    if not (is_large and codes.dtype == torch.float32 and has_kernels(latents)):
        return False
    variances = codes.var(dim=0)
    return bool(variances.topk(min(3, len(variances))).values.sum() > variances.sum() / 2)


def _find_skipping(latents: Tensor, codes: Tensor, number: int) -> Tensor:
    from cbnerf.codebook.nearest_kernels import find_several

    return torch.from_numpy(find_several(latents.detach().numpy(), codes.detach().numpy(), number))


def rows_at_once(latents: Tensor, num_codes: int, max_distances: int | None = None) -> int:
    """Latents per chunk, from `max_distances` or the caches of the device."""
    if max_distances is None:
        max_distances = _CPU_DISTANCES if latents.device.type == "cpu" else _GPU_DISTANCES
    return max(1, max_distances // num_codes)


def _find_least(values: Float[Tensor, "rows columns"]) -> Int[Tensor, " rows"]:
    """Column of the least value of each row; on a CPU five times faster than `argmin`, because
    `amin` is vectorized."""
    num_columns = values.shape[1]
    if values.device.type != "cpu" or num_columns < _MANY or num_columns % _PARTS:
        return values.min(dim=1).indices
    parts = values.view(len(values), _PARTS, -1)
    columns = parts.amin(dim=1).min(dim=1).indices
    rows = torch.arange(len(values))
    return parts[rows, :, columns].min(dim=1).indices * parts.shape[2] + columns


def _find_least_several(
    values: Float[Tensor, "rows columns"], number: int
) -> Int[Tensor, "rows number"]:
    """Columns of the `number` least values of each row, least first.

    They lie in the groups of columns, every n-th together, with the least minima, so a CPU sorts
    these alone: with 4096 columns that takes half of the time.
    """
    rows, num_columns = values.shape
    stride = num_columns // _TOGETHER
    if values.device.type != "cpu" or num_columns % _TOGETHER or stride < 64:
        return values.topk(number, dim=1, largest=False).indices
    groups = values.view(rows, _TOGETHER, stride)
    chosen = groups.amin(dim=1).topk(number, dim=1, largest=False, sorted=False).indices
    candidates = groups.gather(2, chosen[:, None].expand(-1, _TOGETHER, -1)).flatten(1)
    found = candidates.topk(number, dim=1, largest=False).indices
    return found // number * stride + chosen.gather(1, found % number)

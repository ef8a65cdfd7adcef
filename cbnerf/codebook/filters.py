"""Filters of codes: what a code knows of high-res detail, as an affine map of the render around it.

The correction of a pixel is its 7x7 neighbourhood times the filters of its nearest codes, weighted
by their shares; RAISR (Romano et al., 2016) and A+ (Timofte et al., 2014) use one filter, with
codes as their classes and anchors. Filters are solved, not descended: a ridge regression per code
shrinks towards the common filter, so that a code with few pixels corrects as the others do.

Names in this file; images are `[3 height width]` in [-1, 1]:

    rows[p, i]         inputs of pixel p: its 7 x 7 x 3 neighbourhood of the render and a constant 1
    targets[p, 3]      correction wanted at pixel p
    shares[p, n]       weights of the n nearest codes of pixel p; they sum to 1
    equations[c]       normal equations of code c, in which a pixel counts by its share of c
    common filter      least-squares filter of all pixels, whatever their codes
    ridge              pixels that the common filter counts for in the regression of each code
    whitened rows      rows @ W^T with the identity as their mean outer product over all pixels:
                       there the distance of two filters is their mean difference on a pixel
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cbnerf.codebook.nearest import Neighbours
from cbnerf.codebook.neighbourhoods import INPUTS, ROWS, SIDE, Neighbourhoods
from cbnerf.codebook.normal_equations import NormalEquations
from cbnerf.kernels import has_kernels

Filters = Float[Tensor, "*codes inputs 3"]
_JITTER = 1e-5
"""Added to the mean outer product of all rows, whose factor whitens them."""
_CODES_SOLVED = 256
"""Regressions that are solved at once."""
_CODES_SUMMED = 1024
"""Codes whose normal equations are held at once."""
_GROUP = 2**20
"""Pixels, of at least one view, that are sorted by their codes at once."""
_HELD = 2**22
"""Pixels that stay sorted; more are sorted again for each pass."""


class Corrections(NamedTuple):
    """A render, the nearest codes of each pixel, and the target of the correction."""

    sr: Float[Tensor, "3 height width"]
    codes: Neighbours
    """`[height width neighbours]`."""
    target: Float[Tensor, "3 height width"]


class CodeFilters(nn.Module):
    """The filters of all codes; zero, and no correction, until they are fitted."""

    def __init__(self, num_codes: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(num_codes, INPUTS, 3), requires_grad=False)

    def forward(
        self, sr: Float[Tensor, "3 height width"], codes: Neighbours
    ) -> Float[Tensor, "3 height width"]:
        """The correction of each pixel by the filters of its codes `[height width neighbours]`."""
        indices, shares = codes.indices.flatten(0, 1), codes.shares.flatten(0, 1)
        each = self._correct_compiled if has_kernels(sr) else self._correct
        return (shares[..., None] * each(sr, indices)).sum(1).T.view_as(sr)

    def _correct(self, sr: Tensor, indices: Tensor) -> Float[Tensor, "pixels neighbours 3"]:
        """The correction of each filter alone."""
        around = Neighbourhoods([sr])
        corrections = []
        for pixels in torch.arange(len(indices), device=sr.device).split(ROWS):
            rows = around.rows(pixels)
            corrections.append(
                torch.stack(
                    [torch.einsum("ni,nic->nc", rows, self.table[c]) for c in indices[pixels].T], 1
                )
            )
        return torch.cat(corrections)

    def _correct_compiled(self, sr: Tensor, indices: Tensor) -> Tensor:
        from cbnerf.codebook.filter_kernels import apply_each

        image = Neighbourhoods([sr]).padded[0].numpy()
        return torch.from_numpy(apply_each(image, indices.numpy(), self.table.numpy(), SIDE))

    @torch.no_grad()
    def fit_common(self, views: Sequence[Corrections]) -> None:
        """Set the filters of all codes to the common filter of these views."""
        self.table.copy_(_Common(_SortedPixels(views).total()).filter)

    @torch.no_grad()
    def fit(self, views: Sequence[Corrections], ridge: float) -> None:
        """Set the filter of each code to its ridge regression towards the common filter.

        Views may be made on demand: memory does not grow with their number.
        """
        pixels = _SortedPixels(views)
        common = _Common(pixels.total())
        self.table.copy_(common.filter)
        centre = common.to_whitened(common.filter)
        for summed in pixels.codes.split(_CODES_SUMMED):
            equations = common.no_equations(len(summed))
            pixels.add_to(equations, summed, common)
            chunks = (x.split(_CODES_SOLVED) for x in (summed, *equations))
            for solved, *own in zip(*chunks, strict=True):
                whitened = NormalEquations(*own).solve_ridge(centre, ridge)
                self.table[solved] = common.from_whitened(whitened)


class _Common:
    """The common filter, and the transform that whitens rows."""

    def __init__(self, total: NormalEquations):
        count = total.gram[-1, -1].clamp(min=1)
        eye = torch.eye(len(total.gram), dtype=total.gram.dtype, device=total.gram.device)
        factor = torch.linalg.cholesky(total.gram / count + _JITTER * eye)
        self.filter = torch.cholesky_solve(total.moments / count, factor).float()
        self._factor = factor.float()
        self._inverse = torch.linalg.solve_triangular(factor, eye, upper=False).float()

    def no_equations(self, codes: int) -> NormalEquations:
        """Equations of each code before any pixel is added."""
        return NormalEquations.zeros(codes, device=self.filter.device, dtype=self.filter.dtype)

    def whiten(self, rows: Float[Tensor, "pixels inputs"]) -> Float[Tensor, "pixels inputs"]:
        return rows @ self._inverse.T

    def to_whitened(self, filters: Filters) -> Filters:
        """Filters of whitened rows from equal ones of rows."""
        return self._factor.T @ filters

    def from_whitened(self, filters: Filters) -> Filters:
        """Filters of rows from equal ones of whitened rows."""
        return self._inverse.T @ filters


class _SortedPixels:
    """The pixels of all views, group by group; they stay in memory if they are few."""

    def __init__(self, views: Sequence[Corrections]):
        self._views = views
        self._held: list[_Pixels] = []
        self.codes: Tensor
        """Codes of its pixels; set by `total`."""

    def __iter__(self) -> Iterator["_Pixels"]:
        if self._held:
            yield from self._held
            return
        kept, count = [], 0
        for pixels in self._sort():
            count += pixels.count
            kept = [*kept, pixels] if count <= _HELD else []
            yield pixels
        self._held = kept

    def _sort(self) -> Iterator["_Pixels"]:
        group: list[Corrections] = []
        for view in self._views:
            group.append(view)
            if len(group) * view.sr[0].numel() >= _GROUP:
                yield _Pixels(group)
                group.clear()
        if group:
            yield _Pixels(group)

    def total(self) -> NormalEquations:
        """Equations of all pixels, whatever their codes, in float64."""
        total: NormalEquations | None = None
        codes: list[Tensor] = []
        for pixels in self:
            total = total.plus(pixels.total()) if total else pixels.total()
            codes.append(pixels.codes)
        assert total is not None, "no views"
        self.codes = torch.cat(codes).unique()
        return total

    def add_to(
        self, equations: NormalEquations, codes: Int[Tensor, " codes"], common: _Common
    ) -> None:
        """Add the whitened pixels of each of these codes to its equations."""
        for pixels in self:
            pixels.add_to(equations, codes, common)


class _Pixels:
    """The pixels of some views, sorted by their codes; a pixel occurs once for each of them."""

    def __init__(self, views: Sequence[Corrections]):
        self._around = Neighbourhoods([view.sr for view in views])
        self._targets = torch.cat([view.target.flatten(1) for view in views], dim=1).T
        indices, shares = (
            torch.cat([part.flatten(0, 1) for part in parts])
            for parts in zip(*(view.codes for view in views), strict=True)
        )
        self.count = len(indices)
        self._numbers = torch.arange(len(indices), dtype=torch.int32, device=indices.device)
        codes, order = indices.flatten().int().sort()
        self.codes, counts = codes.unique_consecutive(return_counts=True)
        pixels = (order // indices.shape[1]).int().split(counts.tolist())
        sorted_shares = shares.flatten()[order].split(counts.tolist())
        members = zip(pixels, sorted_shares, strict=True)
        self._members = dict(zip(self.codes.tolist(), members, strict=True))
        self._none = self._numbers[:0], shares.new_zeros(0)

    def total(self) -> NormalEquations:
        """Equations of all pixels, whatever their codes, in float64."""
        equations = NormalEquations.zeros(device=self._targets.device)
        for pixels in self._numbers.split(ROWS):
            equations.add(self._around.rows(pixels), self._targets[pixels])
        return equations

    def add_to(
        self, equations: NormalEquations, codes: Int[Tensor, " codes"], common: _Common
    ) -> None:
        members = [self._members.get(code, self._none) for code in codes.tolist()]
        pixels, shares = zip(*members, strict=True)
        slots = torch.arange(len(codes)).repeat_interleave(torch.tensor([len(p) for p in pixels]))
        chunks = (x.split(ROWS) for x in (torch.cat(pixels), torch.cat(shares), slots))
        for some, share, slot in zip(*chunks, strict=True):
            weight = share.sqrt()[:, None]
            rows = common.whiten(self._around.rows(some)) * weight
            targets = self._targets[some] * weight
            present, counts = (x.tolist() for x in slot.unique_consecutive(return_counts=True))
            for code, own, target in zip(
                present, rows.split(counts), targets.split(counts), strict=True
            ):
                # In place: a code has few of these pixels.
                equations.gram[code].addmm_(own.T, own)
                equations.moments[code].addmm_(own.T, target)

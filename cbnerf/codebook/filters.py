"""Filters of codes: what a code knows of high-res detail, as an affine map of the render around it.

The correction of a pixel is its 7x7 neighbourhood times the filters of its nearest codes, each as
much as its share; RAISR (Romano et al., 2016) and A+ (Timofte et al., 2014) take one, with codes as
their classes and anchors. Filters are solved, not descended: ridge regression, in which a pixel
counts for its share, towards the one filter that serves all codes, so that a code met by few pixels
corrects as the others do. Images are `[3 height width]` in [-1, 1].
"""

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cbnerf.codebook.neighbourhoods import INPUTS, ROWS, Neighbourhoods
from cbnerf.codebook.quantizer import Neighbours

PRIORS = (100.0, 300.0, 1e3, 1e4, 3e4, 1e5)
"""Pixels that the common filter counts for in the regression of each code."""
_JURY = 4
"""Every so many-th code takes part in the choice among them, at most those solved at once."""
_RIDGE = 1e-5
_CODES = 256
"""Regressions that are solved at once."""
_SUMMED = 1024
"""Codes whose sums are taken at once."""
_GROUP = 2**20
"""Pixels, of one view at least, that are sorted by their codes at once."""
_HELD = 2**22
"""Pixels, of all parts together, that stay sorted; more are sorted again for each sum."""


class Corrections(NamedTuple):
    """A render, the nearest codes of each pixel, and the correction wanted."""

    sr: Float[Tensor, "3 height width"]
    codes: Neighbours
    """`[height width neighbours]`."""
    wanted: Float[Tensor, "3 height width"]


class CodeFilters(nn.Module):
    """The filters of all codes; zero, and no correction, until they are fitted."""

    def __init__(self, num_codes: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(num_codes, INPUTS, 3), requires_grad=False)

    def forward(
        self, sr: Float[Tensor, "3 height width"], codes: Neighbours
    ) -> Float[Tensor, "3 height width"]:
        """The correction of each pixel by the filters of its codes `[height width neighbours]`."""
        around = Neighbourhoods([sr])
        indices, shares = codes.indices.flatten(0, 1), codes.shares.flatten(0, 1)
        parts = []
        for some in torch.arange(len(indices), device=sr.device).split(ROWS):
            rows = around.rows(some)
            parts.append(
                sum(
                    share[:, None] * torch.einsum("ni,nic->nc", rows, self.table[index])
                    for index, share in zip(indices[some].T, shares[some].T, strict=True)
                )
            )
        return torch.cat(parts).T.view_as(sr)

    @torch.no_grad()
    def fit(self, parts: Sequence[Sequence[Corrections]], held_out: Sequence[int]) -> float:
        """Set the filters to the regression over all parts; returns the weight of the common
        filter: the one of `PRIORS` with which filters of the other parts correct those parts best
        that are `held_out`, each in its turn; without any, the greatest.

        Views may be made on demand: memory is that of a few, however many there are."""
        pixels = [_Part(views, _HELD // len(parts)) for views in parts]
        totals = [part.total() for part in pixels]
        common = _Common(_add(totals))
        codes = torch.cat([part.codes for part in pixels]).unique()
        jury = codes[:: max(_JURY, -(-len(codes) // _CODES))]
        weight = _choose_weight(pixels, totals, common, jury, held_out) if held_out else PRIORS[-1]
        self.table.copy_(common.filter)
        centre = common.enter(common.filter)
        for summed in codes.split(_SUMMED):
            sums = common.no_sums(len(summed))
            for part in pixels:
                part.add_to(sums, summed, common)
            for some, *own in zip(*(x.split(_CODES) for x in (summed, *sums)), strict=True):
                self.table[some] = common.leave(_Sums(*own).solve(centre, weight))
        return weight


class _Sums(NamedTuple):
    """All that regressions need to know of the pixels of some codes."""

    gram: Float[Tensor, "*codes inputs inputs"]
    moments: Float[Tensor, "*codes inputs 3"]

    def solve(
        self, centre: Float[Tensor, "inputs 3"], weight: float
    ) -> Float[Tensor, "*codes inputs 3"]:
        """Ridge regression towards filters that count for so many pixels, whitened ones."""
        eye = torch.eye(len(centre), dtype=centre.dtype, device=centre.device)
        factor = torch.linalg.cholesky(self.gram + weight * eye)
        return centre + torch.cholesky_solve(self.moments - self.gram @ centre, factor)

    def error(self, filters: Float[Tensor, "*codes inputs 3"]) -> Float[Tensor, ""]:
        """Squared error of filters on these pixels, less that of no correction."""
        return (filters * (self.gram @ filters - 2 * self.moments)).sum()


def _add(sums: Sequence[_Sums]) -> _Sums:
    grams, moments = zip(*sums, strict=True)
    return _Sums(reduce(torch.add, grams), reduce(torch.add, moments))


class _Common:
    """The filter that serves all codes, and coordinates in which the pixels around all pixels are
    white: there its distance to other filters is what they differ in on an average pixel."""

    def __init__(self, total: _Sums):
        count = total.gram[-1, -1].clamp(min=1)
        eye = torch.eye(len(total.gram), dtype=total.gram.dtype, device=total.gram.device)
        factor = torch.linalg.cholesky(total.gram / count + _RIDGE * eye)
        self.filter = torch.cholesky_solve(total.moments / count, factor).float()
        self._factor = factor.float()
        self._inverse = torch.linalg.solve_triangular(factor, eye, upper=False).float()

    def no_sums(self, codes: int) -> _Sums:
        """Those of so many codes, before a pixel is added."""
        gram = self.filter.new_zeros(codes, INPUTS, INPUTS)
        return _Sums(gram, self.filter.new_zeros(codes, INPUTS, 3))

    def whiten(self, rows: Float[Tensor, "pixels inputs"]) -> Float[Tensor, "pixels inputs"]:
        return rows @ self._inverse.T

    def enter(self, filters: Float[Tensor, "*codes inputs 3"]) -> Float[Tensor, "*codes inputs 3"]:
        """Filters of white pixels that correct as these do."""
        return self._factor.T @ filters

    def leave(self, filters: Float[Tensor, "*codes inputs 3"]) -> Float[Tensor, "*codes inputs 3"]:
        """Filters of pixels as they are that correct as these do."""
        return self._inverse.T @ filters


class _Part:
    """All pixels of a part, group by group; they are held where there is `room` for all."""

    def __init__(self, views: Sequence[Corrections], room: int):
        self._views, self._room = views, room
        self._held: list[_Pixels] = []
        self.codes: Tensor
        """Those that its pixels have, once the total has been taken."""

    def __iter__(self) -> Iterator["_Pixels"]:
        if self._held:
            yield from self._held
            return
        kept, count = [], 0
        for pixels in self._sort():
            count += pixels.count
            kept = [*kept, pixels] if count <= self._room else []
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

    def total(self) -> _Sums:
        """Over all pixels, in float64."""
        sums: _Sums | None = None
        met: list[Tensor] = []
        for pixels in self:
            own = pixels.total()
            sums = own if sums is None else _add([sums, own])
            met.append(pixels.codes)
        assert sums is not None, "a part without views"
        self.codes = torch.cat(met).unique()
        return sums

    def add_to(self, sums: _Sums, codes: Int[Tensor, " codes"], common: _Common) -> None:
        """Add the whitened pixels of each of these codes, each as much as its share."""
        for pixels in self:
            pixels.add_to(sums, codes, common)


class _Pixels:
    """The pixels of some views, sorted by their codes: a pixel stands with each of them."""

    def __init__(self, views: Sequence[Corrections]):
        self._around = Neighbourhoods([view.sr for view in views])
        self._wanted = torch.cat([view.wanted.flatten(1) for view in views], dim=1).T
        indices, shares = (
            torch.cat([part.flatten(0, 1) for part in parts])
            for parts in zip(*(view.codes for view in views), strict=True)
        )
        self.count = len(indices)
        self._places = torch.arange(len(indices), dtype=torch.int32, device=indices.device)
        codes, order = indices.flatten().int().sort()
        self.codes, counts = codes.unique_consecutive(return_counts=True)
        pixels = (order // indices.shape[1]).int().split(counts.tolist())
        counted = shares.flatten()[order].split(counts.tolist())
        members = zip(pixels, counted, strict=True)
        self._members = dict(zip(self.codes.tolist(), members, strict=True))
        self._nobody = self._places[:0], shares.new_zeros(0)

    def total(self) -> _Sums:
        """Over all pixels, in float64."""
        gram = self._wanted.new_zeros(INPUTS, INPUTS, dtype=torch.float64)
        moments = self._wanted.new_zeros(INPUTS, 3, dtype=torch.float64)
        for places in self._places.split(ROWS):
            rows = self._around.rows(places)
            gram += rows.T @ rows
            moments += rows.T @ self._wanted[places]
        return _Sums(gram, moments)

    def add_to(self, sums: _Sums, codes: Int[Tensor, " codes"], common: _Common) -> None:
        members = [self._members.get(code, self._nobody) for code in codes.tolist()]
        own, shares = zip(*members, strict=True)
        slots = torch.arange(len(codes)).repeat_interleave(torch.tensor([len(o) for o in own]))
        chunks = (x.split(ROWS) for x in (torch.cat(own), torch.cat(shares), slots))
        for places, share, some in zip(*chunks, strict=True):
            weight = share.sqrt()[:, None]
            rows = common.whiten(self._around.rows(places)) * weight
            wanted = self._wanted[places] * weight
            met, counts = (x.tolist() for x in some.unique_consecutive(return_counts=True))
            for slot, of_code, target in zip(
                met, rows.split(counts), wanted.split(counts), strict=True
            ):
                sums.gram[slot].addmm_(of_code.T, of_code)
                sums.moments[slot].addmm_(of_code.T, target)


def _choose_weight(
    pixels: Sequence[_Part],
    totals: Sequence[_Sums],
    common: _Common,
    codes: Int[Tensor, " codes"],
    held_out: Sequence[int],
) -> float:
    """With which of `PRIORS` filters of these codes do best where they have not been fitted."""
    own = [common.no_sums(len(codes)) for _ in pixels]
    for part, sums in zip(pixels, own, strict=True):
        part.add_to(sums, codes, common)
    errors = own[0].gram.new_zeros(len(PRIORS))
    for i in held_out:
        others, total = (_add([*sums[:i], *sums[i + 1 :]]) for sums in (own, totals))
        centre = common.enter(_Common(total).filter)
        for j, weight in enumerate(PRIORS):
            errors[j] += own[i].error(others.solve(centre, weight))
    return PRIORS[int(errors.argmin())]

"""What the low-res photographs of a scene say of a refiner that has seen no high-res one of it.

A refined view, shrunk, must give its photograph back, as in iterative back-projection (Irani and
Peleg, 1991); what is found here is not the correction of a view but a filter that makes it, and
so sharpens views that were never photographed, too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cbnerf.codebook.neighbourhoods import INPUTS, ROWS, Neighbourhoods, solve
from cbnerf.downsampling import REACH, Kernel, downsample


class LowResView(NamedTuple):
    """A view of which only a low-res photograph exists; colours in [0, 1]."""

    render: Float[Tensor, "3 height width"]
    refined: Float[Tensor, "3 height width"]
    photograph: Float[Tensor, "3 low_height low_width"]


@torch.no_grad()
def fit_consistent_filter(
    views: Sequence[LowResView], weight: float, kernel: Kernel
) -> Float[Tensor, "inputs 3"]:
    """The filter of renders that, added to refined views, minimises the squared error of what
    they are when shrunk by the kernel of the photographs, `weight` times, and the squared change of
    their pixels.

    The change keeps what other scenes taught where low-res pixels say nothing.
    """
    device = views[0].render.device
    gram = torch.zeros(INPUTS, INPUTS, dtype=torch.float64, device=device)
    moments = torch.zeros(INPUTS, 3, dtype=torch.float64, device=device)
    for render, refined, photograph in views:
        scale = render.shape[2] // photograph.shape[2]
        missing = photograph - downsample(refined[None], scale, kernel)[0]
        around = Neighbourhoods([render])
        strip = max(ROWS // (scale * render.shape[2]), 1)
        for top in range(0, len(missing[0]), strip):
            rows, low_res = _strip(around, render, range(top, top + strip), scale, kernel)
            wanted = missing[:, top : top + strip].flatten(1).T.double()
            gram += low_res.T @ low_res + rows.T @ rows / (weight * scale**2)
            moments += low_res.T @ wanted
    return solve(gram, moments)


def _strip(
    around: Neighbourhoods, render: Tensor, low_rows: range, scale: int, kernel: Kernel
) -> tuple[Float[Tensor, "pixels inputs"], Float[Tensor, "low_pixels inputs"]]:
    """What a filter sees at the pixels of these low-res rows, and the same shrunk, for what it
    makes of an image is linear in that."""
    height, width = render.shape[1] // scale, render.shape[2]
    first, last = max(low_rows.start - REACH[kernel], 0), min(low_rows.stop + REACH[kernel], height)
    begin, end = low_rows.start - first, min(low_rows.stop, height) - first
    places = torch.arange(first * scale * width, last * scale * width, device=render.device)
    planes = around.rows(places).double().T.unflatten(1, (-1, width))
    low_res = downsample(planes[None], scale, kernel)[0, :, begin:end]
    rows = planes[:, begin * scale : end * scale]
    return rows.flatten(1).T, low_res.flatten(1).T

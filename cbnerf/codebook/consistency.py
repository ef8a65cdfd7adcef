"""What the low-res photographs of a scene say of a refiner that has seen no high-res one of it.

A refined view, shrunk, must give its photograph back, as in iterative back-projection (Irani and
Peleg, 1991); what is found here is not the correction of a view but a filter that makes it, and
so sharpens views that were never photographed, too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cbnerf.codebook.neighbourhoods import INPUTS, ROWS, Neighbourhoods, solve


class LowResView(NamedTuple):
    """A view of which only a low-res photograph exists; colours in [0, 1]."""

    render: Float[Tensor, "3 height width"]
    refined: Float[Tensor, "3 height width"]
    photograph: Float[Tensor, "3 low_height low_width"]


@torch.no_grad()
def fit_consistent_filter(views: Sequence[LowResView], weight: float) -> Float[Tensor, "inputs 3"]:
    """The filter of renders that, added to refined views, minimises the squared error of their
    block means against the photographs, `weight` times, and the squared change of their pixels.

    The change keeps what other scenes taught where low-res pixels say nothing.
    """
    device = views[0].render.device
    gram = torch.zeros(INPUTS, INPUTS, dtype=torch.float64, device=device)
    moments = torch.zeros(INPUTS, 3, dtype=torch.float64, device=device)
    for render, refined, photograph in views:
        width, scale = render.shape[2], render.shape[2] // photograph.shape[2]
        missing = (photograph - F.avg_pool2d(refined, scale)).flatten(1).T.double()
        around = Neighbourhoods([render])
        places = torch.arange(render[0].numel(), device=device)
        strip = max(ROWS // (scale * width), 1) * scale * width  # whole rows of blocks
        for some, wanted in zip(places.split(strip), missing.split(strip // scale**2), strict=True):
            rows = around.rows(some).double()
            means = rows.unflatten(0, (-1, scale, width // scale, scale)).mean((1, 3)).flatten(0, 1)
            gram += means.T @ means + rows.T @ rows / (weight * scale**2)
            moments += means.T @ wanted
    return solve(gram, moments)

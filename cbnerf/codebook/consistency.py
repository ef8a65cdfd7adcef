"""Consistency of a refiner with the low-res photographs of a scene that has no high-res ones.

A refined view must give its photograph when it is downsampled, as in iterative back-projection
(Irani and Peleg, 1991). The result is not a correction of these views but a filter, which applies
to views that were never photographed, too.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from cbnerf.codebook.neighbourhoods import ROWS, Neighbourhoods
from cbnerf.codebook.normal_equations import NormalEquations
from cbnerf.codebook.views import Views
from cbnerf.downsampling import REACH, Kernel, downsample
from cbnerf.metrics import to_8bit


@torch.no_grad()
def fit_consistent_filter(
    refine: Callable[[Tensor], Tensor], views: Views, weight: float, kernel: Kernel
) -> Float[Tensor, "inputs 3"]:
    """The filter of renders that, added to refined views, minimises `weight` times the squared
    error of the downsampled views plus the squared change of their pixels.

    The second term keeps what was learned from other scenes where low-res pixels say nothing.
    `refine` maps a render to the refined view; colours are in [0, 1].
    """
    equations = NormalEquations.zeros(device=views.renders[0].device)
    for batch, photographs in zip(views.renders, views.photographs, strict=True):
        render, photograph = batch[0, :3], photographs[0]
        refined = to_8bit(refine(batch)).float() / 255  # as it would be saved
        scale = render.shape[2] // photograph.shape[2]
        residual = photograph - downsample(refined, scale, kernel)[0]
        around = Neighbourhoods([render])
        strip = max(ROWS // (scale * render.shape[2]), 1)
        for top in range(0, len(residual[0]), strip):
            rows, low_res = _strip(around, render, range(top, top + strip), scale, kernel)
            target = residual[:, top : top + strip].flatten(1).T.double()
            change = rows.T @ rows / (weight * scale**2)
            equations = equations.plus(
                NormalEquations(low_res.T @ low_res + change, low_res.T @ target)
            )
    return equations.solve()


def _strip(
    around: Neighbourhoods, render: Tensor, low_rows: range, scale: int, kernel: Kernel
) -> tuple[Float[Tensor, "pixels inputs"], Float[Tensor, "low_pixels inputs"]]:
    """Inputs of the filter at the pixels of these low-res rows, and those inputs downsampled: the
    downsampled output of a filter is the filter of the downsampled inputs."""
    height, width = render.shape[1] // scale, render.shape[2]
    first, last = max(low_rows.start - REACH[kernel], 0), min(low_rows.stop + REACH[kernel], height)
    begin, end = low_rows.start - first, min(low_rows.stop, height) - first
    places = torch.arange(first * scale * width, last * scale * width, device=render.device)
    planes = around.rows(places).double().T.unflatten(1, (-1, width))
    low_res = downsample(planes[None], scale, kernel)[0, :, begin:end]
    rows = planes[:, begin * scale : end * scale]
    return rows.flatten(1).T, low_res.flatten(1).T

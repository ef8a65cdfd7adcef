"""The baseline that any refiner must beat: one 7x7 filter, fitted to the training views.

There is nothing to search and nothing random: the filter is the minimum of the squared error.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cbnerf.codebook.neighbourhoods import INPUTS, ROWS, SIDE, Neighbourhoods, solve


class LinearRefiner(nn.Module):
    """Each refined colour is a linear function of the 7x7 pixels around it, and a constant."""

    def __init__(self):
        super().__init__()
        self.filter = nn.Conv2d(3, 3, SIDE, padding=SIDE // 2, padding_mode="replicate")
        nn.init.dirac_(self.filter.weight)
        nn.init.zeros_(self.filter.bias)  # pyright: ignore[reportArgumentType]

    @torch.no_grad()
    def refine(
        self, sr: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Refine whole images of any size, in [0, 1]."""
        return self.filter(sr).clamp(0, 1)

    @torch.no_grad()
    def add_filter(self, filter: Float[Tensor, "inputs 3"]) -> None:
        """Correct by this filter of the render, too."""
        self.filter.weight += filter[:-1].T.reshape_as(self.filter.weight)
        assert self.filter.bias is not None
        self.filter.bias += filter[-1]


@torch.no_grad()
def fit_filter(
    refiner: LinearRefiner,
    pairs: Iterable[tuple[Float[Tensor, "3 _ _"], Float[Tensor, "3 _ _"]]],
) -> float:
    """Set the filter to the least-squares solution over pairs of render and photograph.

    Returns its mean squared error, of values in [0, 1], before clamping.
    """
    device = refiner.filter.weight.device
    gram = torch.zeros(INPUTS, INPUTS, dtype=torch.float64, device=device)
    moments = torch.zeros(INPUTS, 3, dtype=torch.float64, device=device)
    square, count = torch.zeros((), dtype=torch.float64, device=device), 0
    for render, photograph in pairs:
        around, wanted = Neighbourhoods([render]), photograph.flatten(1).T.double()
        for places in torch.arange(len(wanted), device=device).split(ROWS):
            rows, colors = around.rows(places).double(), wanted[places]
            gram += rows.T @ rows
            moments += rows.T @ colors
            square += colors.square().sum()
            count += colors.numel()
    solution = solve(gram, moments)
    for parameter in refiner.parameters():
        parameter.zero_()
    refiner.add_filter(solution)
    error = square - 2 * (solution * moments).sum() + (solution * (gram @ solution)).sum()
    return float(error) / count

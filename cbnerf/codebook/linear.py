"""The baseline that any refiner must beat: one 7x7 filter, fitted to the training views.

There is nothing to search and nothing random: the filter is the minimum of the squared error.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

SIDE = 7
"""Pixels per side of the filter."""
_STRIP = 64
"""Rows of an image that are unfolded at once."""


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
def fit_filter(
    refiner: LinearRefiner,
    pairs: Iterable[tuple[Float[Tensor, "3 _ _"], Float[Tensor, "3 _ _"]]],
) -> float:
    """Set the filter to the least-squares solution over pairs of render and photograph.

    Returns its mean squared error, of values in [0, 1], before clamping.
    """
    device = refiner.filter.weight.device
    inputs = 3 * SIDE**2 + 1
    gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
    moments = torch.zeros(inputs, 3, dtype=torch.float64, device=device)
    square, count = torch.zeros((), dtype=torch.float64, device=device), 0
    for render, photograph in pairs:
        for rows, colors in _unfold(render, photograph):
            gram += rows @ rows.T
            moments += rows @ colors.T
            square += colors.square().sum()
            count += colors.numel()
    # gelsd, which bears a rank-deficient system, exists on the CPU only.
    solution = torch.linalg.lstsq(gram.cpu(), moments.cpu(), driver="gelsd").solution.to(device)
    refiner.filter.weight.copy_(solution[:-1].T.reshape_as(refiner.filter.weight))
    assert refiner.filter.bias is not None
    refiner.filter.bias.copy_(solution[-1])
    error = square - 2 * (solution * moments).sum() + (solution * (gram @ solution)).sum()
    return float(error) / count


def _unfold(
    render: Tensor, photograph: Tensor
) -> Iterable[tuple[Float[Tensor, "inputs pixels"], Float[Tensor, "3 pixels"]]]:
    """Neighbourhoods, with a one for the constant, and the colours wanted; some rows at a time."""
    margin = SIDE // 2
    padded = F.pad(render[None], (margin,) * 4, mode="replicate")
    for top in range(0, photograph.shape[1], _STRIP):
        colors = photograph[:, top : top + _STRIP].flatten(1).double()
        strip = padded[:, :, top : top + _STRIP + 2 * margin]
        around = F.unfold(strip, SIDE)[0].double()
        yield torch.cat([around, torch.ones_like(around[:1])]), colors

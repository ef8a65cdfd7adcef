"""The baseline that any refiner must beat: one 7x7 filter, fitted to the training views.

There is nothing to search and nothing random: the filter is the minimum of the squared error.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cbnerf.codebook.consistency import fit_consistent_filter
from cbnerf.codebook.encoders import SRBatch
from cbnerf.codebook.neighbourhoods import ROWS, SIDE, Neighbourhoods
from cbnerf.codebook.normal_equations import NormalEquations
from cbnerf.codebook.refiner import DEFAULT_TILE, ImageBatch, Refiner
from cbnerf.codebook.views import Views
from cbnerf.config import Config
from cbnerf.downsampling import Kernel


class LinearRefiner(Refiner):
    """Each refined colour is a linear function of the 7x7 pixels around it, and a constant."""

    autoencoder = None

    def __init__(self, config: Config):
        super().__init__()
        self._consistency = config.refiner.consistency
        self._low_res_kernel: Kernel = config.data.low_res_kernel
        self.filter = nn.Conv2d(3, 3, SIDE, padding=SIDE // 2, padding_mode="replicate")
        nn.init.dirac_(self.filter.weight)
        nn.init.zeros_(self.filter.bias)  # pyright: ignore[reportArgumentType]
        self.requires_grad_(False)

    @torch.no_grad()
    def fit(self, views: Views, low_res: Views | None = None) -> None:
        """Set the filter to the least-squares solution; with `low_res`, add the filter that makes
        refined views consistent with those."""
        device = self.filter.weight.device
        equations = NormalEquations.zeros(device=device)
        square, count = torch.zeros((), dtype=torch.float64, device=device), 0
        for render, photograph in zip(views.renders, views.photographs, strict=True):
            around, target = Neighbourhoods([render[0, :3]]), photograph[0].flatten(1).T.double()
            for pixels in torch.arange(len(target), device=device).split(ROWS):
                equations.add(around.rows(pixels).double(), target[pixels])
                square += target[pixels].square().sum()
            count += target.numel()
        solution = equations.solve()
        for parameter in self.parameters():
            parameter.zero_()
        self.add_filter(solution)
        self._loss = float(square + equations.error(solution)) / count
        if low_res:
            self.add_filter(
                fit_consistent_filter(self.refine, low_res, self._consistency, self._low_res_kernel)
            )

    def metrics(self) -> dict[str, float]:
        """`train/loss`: the mean squared error of the fitted views, of values in [0, 1], before
        clamping and without `low_res`."""
        return {"train/loss": self._loss}

    @torch.no_grad()
    def refine(
        self, sr: SRBatch, references: Tensor | None = None, *, tile: int = DEFAULT_TILE
    ) -> ImageBatch:
        """Refine whole images of any size, in [0, 1]."""
        return self.filter(sr[:, :3]).clamp(0, 1)

    @torch.no_grad()
    def add_filter(self, filter: Float[Tensor, "inputs 3"]) -> None:
        """Add a filter of the render to this one."""
        self.filter.weight += filter[:-1].T.view(3, SIDE, SIDE, 3).movedim(-1, 1)
        assert self.filter.bias is not None
        self.filter.bias += filter[-1]

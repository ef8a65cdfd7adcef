"""Normal equations of linear least squares: all that a regression needs to know of its rows.

    X[row, input]      inputs of each row: the neighbourhood of a pixel
    Y[row, 3]          targets of each row: the wanted colours
    gram               X^T X
    moments            X^T Y

Equations of disjoint rows add up to those of all rows. Leading axes are independent regressions.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cbnerf.codebook.neighbourhoods import INPUTS


class NormalEquations(NamedTuple):
    gram: Float[Tensor, "*regressions inputs inputs"]
    moments: Float[Tensor, "*regressions inputs 3"]

    @staticmethod
    def zeros(
        *regressions: int, device: torch.device, dtype: torch.dtype = torch.float64
    ) -> "NormalEquations":
        """Those of no rows."""
        return NormalEquations(
            torch.zeros(*regressions, INPUTS, INPUTS, dtype=dtype, device=device),
            torch.zeros(*regressions, INPUTS, 3, dtype=dtype, device=device),
        )

    def add(self, rows: Float[Tensor, "rows inputs"], targets: Float[Tensor, "rows 3"]) -> None:
        """Add rows, whose products are taken in their own precision."""
        self.gram.add_(rows.T @ rows)
        self.moments.add_(rows.T @ targets)

    def plus(self, other: "NormalEquations") -> "NormalEquations":
        return NormalEquations(self.gram + other.gram, self.moments + other.moments)

    def solve(self) -> Float[Tensor, "inputs 3"]:
        """The least-squares solution; the minimum-norm one if the equations are singular (flat
        images)."""
        # Only gelsd handles singular systems, and only on the CPU.
        found = torch.linalg.lstsq(self.gram.cpu(), self.moments.cpu(), driver="gelsd")
        return found.solution.to(self.gram.device)

    def solve_ridge(
        self, centre: Float[Tensor, "inputs 3"], ridge: float
    ) -> Float[Tensor, "*regressions inputs 3"]:
        """Ridge regression towards `centre`: adds `ridge` times the squared distance to it."""
        eye = torch.eye(len(centre), dtype=centre.dtype, device=centre.device)
        factor = torch.linalg.cholesky(self.gram + ridge * eye)
        return centre + torch.cholesky_solve(self.moments - self.gram @ centre, factor)

    def error(self, solution: Float[Tensor, "*regressions inputs 3"]) -> Float[Tensor, ""]:
        """Squared error of a solution on these rows, minus that of zero (|Y|^2)."""
        return (solution * (self.gram @ solution - 2 * self.moments)).sum()

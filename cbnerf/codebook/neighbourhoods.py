"""7x7 neighbourhoods of pixels as rows of a linear system."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

SIDE = 7
"""Side of a filter in pixels."""
INPUTS = 3 * SIDE**2 + 1
"""Inputs of a filter: 3 x 7 x 7 colours and a constant one."""
ROWS = 2**15
"""Neighbourhoods per chunk."""


class Neighbourhoods:
    """The 7x7 pixels around each pixel of images of one size; the border is replicated."""

    def __init__(self, images: Sequence[Float[Tensor, "3 height width"]]):
        padded = F.pad(torch.stack(list(images)), (SIDE // 2,) * 4, mode="replicate")
        self._windows = padded.unfold(2, SIDE, 1).unfold(3, SIDE, 1)

    def rows(self, places: Int[Tensor, " pixels"]) -> Float[Tensor, "pixels inputs"]:
        """Neighbourhoods, with a final one, of pixels numbered through all images, row by row."""
        _, _, height, width, _, _ = self._windows.shape
        image, row = places // (height * width), places // width % height
        around = self._windows[image, :, row, places % width].flatten(1)
        return torch.cat([around, torch.ones_like(around[:, :1])], dim=1)


def solve(
    gram: Float[Tensor, "inputs inputs"], moments: Float[Tensor, "inputs 3"]
) -> Float[Tensor, "inputs 3"]:
    """The least-squares filter from the normal equations; the minimum-norm one if they are singular
    (flat images)."""
    # Only gelsd handles singular systems, and only on the CPU.
    found = torch.linalg.lstsq(gram.cpu(), moments.cpu(), driver="gelsd")
    return found.solution.to(gram.device)

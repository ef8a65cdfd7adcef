"""The pixels around each pixel, as linear filters see them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

SIDE = 7
"""Pixels per side of a filter."""
INPUTS = 3 * SIDE**2 + 1
"""Colours that a filter sees, and a one for its constant."""
ROWS = 2**15
"""Neighbourhoods that are held at once."""


class Neighbourhoods:
    """The 7x7 pixels around each pixel of images of one size, and a one for the constant."""

    def __init__(self, images: Sequence[Float[Tensor, "3 height width"]]):
        padded = F.pad(torch.stack(list(images)), (SIDE // 2,) * 4, mode="replicate")
        self._windows = padded.unfold(2, SIDE, 1).unfold(3, SIDE, 1)

    def rows(self, places: Int[Tensor, " pixels"]) -> Float[Tensor, "pixels inputs"]:
        """Of the pixels at these places, counted through all images."""
        _, _, height, width, _, _ = self._windows.shape
        image, row = places // (height * width), places // width % height
        around = self._windows[image, :, row, places % width].flatten(1)
        return torch.cat([around, torch.ones_like(around[:, :1])], dim=1)


def solve(
    gram: Float[Tensor, "inputs inputs"], moments: Float[Tensor, "inputs 3"]
) -> Float[Tensor, "inputs 3"]:
    """The least-squares filter, the smallest where flat images leave the system rank-deficient."""
    # gelsd, which bears that, exists on the CPU only.
    found = torch.linalg.lstsq(gram.cpu(), moments.cpu(), driver="gelsd")
    return found.solution.to(gram.device)

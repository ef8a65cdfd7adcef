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
"""Chunk size: neighbourhoods that are unfolded at once."""


class Neighbourhoods:
    """The 7x7 pixels around each pixel of images of one size; the border is replicated."""

    padded: Float[Tensor, "images height width 3"]
    """The images with their borders."""

    def __init__(self, images: Sequence[Float[Tensor, "3 height width"]]):
        padded = F.pad(torch.stack(list(images)), (SIDE // 2,) * 4, mode="replicate")
        # Channels last: a row of a neighbourhood is one piece of memory.
        self.padded = padded.movedim(1, -1).contiguous()
        count, height, width, channels = self.padded.shape
        image, row, pixel, _ = self.padded.stride()
        self._windows = self.padded.as_strided(
            (count, height - SIDE + 1, width - SIDE + 1, SIDE, SIDE * channels),
            (image, row, pixel, row, 1),
        )

    def rows(self, places: Int[Tensor, " pixels"]) -> Float[Tensor, "pixels inputs"]:
        """Neighbourhoods (by row, column, channel), and a constant 1 as last input, of pixels
        numbered row by row through all images."""
        _, height, width, _, _ = self._windows.shape
        image, row = places // (height * width), places // width % height
        around = self._windows[image, row, places % width].flatten(1)
        return torch.cat([around, torch.ones_like(around[:, :1])], dim=1)

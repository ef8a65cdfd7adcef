"""Detects divergence of a field whose numbers stay finite: it saturates at one colour."""

import math
from collections.abc import Callable

from torch import Tensor

_TOLERANCE = 1.5
"""Times the error of the untrained field and of the mean colour."""


class DivergenceCheck:
    """Compares the squared error on a fixed sample of pixels with that of the untrained field and
    with that of the best constant prediction, the mean colour of all training pixels.

    A short training, or one with a tiny learning rate, may not beat the mean colour yet, but its
    error does not exceed that of the untrained field.
    """

    def __init__(self, error: Callable[[], Tensor], of_mean_colour: Tensor):
        """`error` computes the error of the field in its present state."""
        self._error, self._untrained = error, float(error())
        self._of_mean_colour = float(of_mean_colour)

    def __call__(self) -> None:
        """Raise FloatingPointError if the error clearly exceeds both."""
        now = float(self._error())
        if not now <= _TOLERANCE * max(self._untrained, self._of_mean_colour):
            raise FloatingPointError(
                f"field: diverged to a PSNR of {_in_db(now):.1f} dB on training pixels; untrained "
                f"it has {_in_db(self._untrained):.1f} dB, their mean colour "
                f"{_in_db(self._of_mean_colour):.1f} dB; lower field.optim.lr"
            )


def _in_db(error: float) -> float:
    return -10 * math.log10(max(error, 1e-10))

"""Divergence of a field whose numbers all stay finite: it saturates at some colour, and a training
that goes on ends without a sign of it.
"""

import math
from collections.abc import Callable

from torch import Tensor

_BEYOND_DOUBT = 1.5
"""Times the error of the untrained field, and of one colour."""


class DivergenceCheck:
    """Compares the squared error on some pixels, always the same, with that of the untrained field
    and with that of their best constant prediction, the mean colour of all training pixels.

    Short trainings, and those of a tiny learning rate, may not have come below one colour yet; but
    they do not end with a larger error than they began with.
    """

    def __init__(self, error: Callable[[], Tensor], of_mean_colour: Tensor):
        """`error` computes it from the field as it is."""
        self._error, self._untrained = error, float(error())
        self._of_mean_colour = float(of_mean_colour)

    def __call__(self) -> None:
        """Raise FloatingPointError where it is beyond doubt larger than both."""
        now = float(self._error())
        if not now <= _BEYOND_DOUBT * max(self._untrained, self._of_mean_colour):
            raise FloatingPointError(
                f"field: diverged to a PSNR of {_in_db(now):.1f} dB on training pixels; untrained "
                f"it has {_in_db(self._untrained):.1f} dB, their mean colour "
                f"{_in_db(self._of_mean_colour):.1f} dB; lower field.optim.lr"
            )


def _in_db(error: float) -> float:
    return -10 * math.log10(max(error, 1e-10))

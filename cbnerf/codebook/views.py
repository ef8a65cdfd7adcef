"""Views of a scene, of which few fit into the memory of a GPU at a time."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from jaxtyping import Float
from torch import Tensor

Item = TypeVar("Item")


class MadeOnDemand(Sequence[Item]):
    """A sequence whose items are computed at every access and not stored."""

    def __init__(self, make: Callable[[int], Item], numbers: Sequence[int]):
        self._make, self._numbers = make, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Item:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._make(self._numbers[index])


Images = Sequence[Float[Tensor, "1 _ _ _"]]
"""Batches of one image each, in [0, 1]; renders have their positions as further channels."""


class Views(NamedTuple):
    """Views that a refiner is fitted to."""

    renders: Images
    photographs: Images
    """High-res, or low-res where a scene has no others."""

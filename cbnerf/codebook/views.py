"""Views of a scene, of which few fit into the memory of a GPU at a time."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from jaxtyping import Float
from torch import Tensor

View = TypeVar("View")


class MadeOnDemand(Sequence[View]):
    """A sequence whose items are made anew whenever they are asked for, and not held."""

    def __init__(self, make: Callable[[int], View], numbers: Sequence[int]):
        self._make, self._numbers = make, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> View:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._make(self._numbers[index])


Images = Sequence[Float[Tensor, "1 3 _ _"]]
"""Batches of one image each, in [0, 1]."""

"""Random numbers that depend on seed and step, but not on the number of processes.

Every process draws the numbers of the whole global batch and keeps its own rows, so N processes
train on exactly the batches of one process, and a resumed run equals an uninterrupted one.
"""

import torch
from torch import Tensor


class Rng:
    """The random numbers of one training step; the same calls in the same order give the same
    numbers."""

    def __init__(
        self, seed: int, step: int, device: torch.device, *, rank: int = 0, world_size: int = 1
    ):
        self._generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
        self._device = device
        self._rank = rank
        self._world_size = world_size

    def uniform(self, rows: int, *shape: int) -> Tensor:
        """Float32 in [0, 1), `[rows *shape]`: this process's rows of the global batch."""
        drawn = torch.rand(
            rows * self._world_size, *shape, generator=self._generator, device=self._device
        )
        return self._own(drawn, rows)

    def normal(self, rows: int, *shape: int) -> Tensor:
        """Standard normal float32, `[rows *shape]`."""
        drawn = torch.randn(
            rows * self._world_size, *shape, generator=self._generator, device=self._device
        )
        return self._own(drawn, rows)

    def integers(self, high: int, rows: int, *shape: int) -> Tensor:
        """Int64 in [0, high), `[rows *shape]`."""
        drawn = torch.randint(
            high, (rows * self._world_size, *shape), generator=self._generator, device=self._device
        )
        return self._own(drawn, rows)

    def _own(self, drawn: Tensor, rows: int) -> Tensor:
        return drawn[self._rank * rows : (self._rank + 1) * rows]

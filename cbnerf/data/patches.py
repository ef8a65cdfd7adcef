"""Patches of stage-1 renders and photographs at the same random places."""

from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from cbnerf.config import KnobError
from cbnerf.rng import Rng


class PatchBatch(NamedTuple):
    """Values in [0, 1]."""

    sr: Float[Tensor, "patches 3 size size"]
    """Cut from stage-1 renders."""
    high_res: Float[Tensor, "patches 3 size size"]
    """Cut from photographs."""


class PatchSampler:
    """Draws patches from all views, flipped and turned at random; all images are on one device."""

    def __init__(
        self,
        renders: UInt8[Tensor, "views height width 3"],
        photographs: UInt8[Tensor, "views height width 3"],
        patch_size: int,
        device: torch.device,
    ):
        check_patch_size(patch_size, photographs)
        pairs = torch.stack([renders, photographs], dim=1)
        self._pairs = pairs.movedim(-1, 2).contiguous().to(device)
        self._size = patch_size

    def draw(self, batch_size: int, rng: Rng) -> PatchBatch:
        """A batch, uniform over views and places."""
        views, _, _, height, width = self._pairs.shape
        device, size = self._pairs.device, self._size
        view = rng.integers(views, batch_size)
        top = rng.integers(height - size + 1, batch_size)
        left = rng.integers(width - size + 1, batch_size)
        steps = torch.arange(size, device=device)
        rows = (top[:, None] + steps)[:, None, None, :, None]
        columns = (left[:, None] + steps)[:, None, None, None, :]
        pair, channel = torch.arange(2, device=device), torch.arange(3, device=device)
        cut = self._pairs[
            view[:, None, None, None, None],
            pair[None, :, None, None, None],
            channel[None, None, :, None, None],
            rows,
            columns,
        ]
        cut = _turn(cut.float() / 255, rng.integers(8, batch_size))
        return PatchBatch(cut[:, 0], cut[:, 1])


def check_patch_size(patch_size: int, images: UInt8[Tensor, "*views height width 3"]) -> None:
    """KnobError if a patch does not fit into an image."""
    height, width = images.shape[-3:-1]
    if patch_size > min(height, width):
        raise KnobError(
            f"refiner.patch_size = {patch_size} does not fit into {width}x{height} images"
        )


def _turn(
    cut: Float[Tensor, "patches 2 3 size size"], symmetry: Tensor
) -> Float[Tensor, "patches 2 3 size size"]:
    """One of the eight symmetries of the square for each pair."""
    choose = symmetry[:, None, None, None, None]
    cut = torch.where(choose % 2 == 1, cut.flip(-1), cut)
    cut = torch.where(choose // 2 % 2 == 1, cut.flip(-2), cut)
    return torch.where(choose // 4 == 1, cut.transpose(-1, -2), cut)

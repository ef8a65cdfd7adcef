"""Patches of stage-1 renders and photographs at the same random places."""

from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from cbnerf.config import KnobError
from cbnerf.data.renders import Renders
from cbnerf.rng import Rng


class PatchBatch(NamedTuple):
    """Colours in [0, 1]."""

    sr: Float[Tensor, "patches 6 size size"]
    """Cut from stage-1 renders: colours, then positions."""
    high_res: Float[Tensor, "patches 3 size size"]
    """Cut from photographs."""


class PatchSampler:
    """Draws patches from all views, flipped and turned at random if `turned`; all images are on one
    device."""

    def __init__(
        self,
        renders: Renders,
        photographs: UInt8[Tensor, "views height width 3"],
        patch_size: int,
        device: torch.device,
        *,
        turned: bool = True,
    ):
        check_patch_size(patch_size, photographs)
        colours = torch.cat([renders.rgb, photographs], dim=-1)
        self._colours = colours.movedim(-1, 1).contiguous().to(device)
        self._positions = renders.positions.movedim(-1, 1).contiguous().to(device)
        self._size, self._turned = patch_size, turned

    def draw(self, batch_size: int, rng: Rng) -> PatchBatch:
        """A batch, uniform over views and places."""
        views, _, height, width = self._colours.shape
        device, size = self._colours.device, self._size
        view = rng.integers(views, batch_size)
        top = rng.integers(height - size + 1, batch_size)
        left = rng.integers(width - size + 1, batch_size)
        steps = torch.arange(size, device=device)
        rows = (top[:, None] + steps)[:, None, :, None]
        columns = (left[:, None] + steps)[:, None, None]

        def cut(images: Tensor) -> Tensor:
            channels = torch.arange(images.shape[1], device=device)[None, :, None, None]
            return images[view[:, None, None, None], channels, rows, columns].float()

        render, photograph = (cut(self._colours) / 255).split(3, dim=1)
        joined = torch.cat([render, cut(self._positions), photograph], dim=1)
        if self._turned:
            joined = _turn(joined, rng.integers(8, batch_size))
        return PatchBatch(*joined.split([6, 3], dim=1))


def check_patch_size(patch_size: int, images: UInt8[Tensor, "*views height width 3"]) -> None:
    """KnobError if a patch does not fit into an image."""
    height, width = images.shape[-3:-1]
    if patch_size > min(height, width):
        raise KnobError(
            f"refiner.patch_size = {patch_size} does not fit into {width}x{height} images"
        )


def _turn(
    cut: Float[Tensor, "patches 9 size size"], symmetry: Tensor
) -> Float[Tensor, "patches 9 size size"]:
    """One of the eight symmetries of the square for each patch."""
    choose = symmetry[:, None, None, None]
    cut = torch.where(choose % 2 == 1, cut.flip(-1), cut)
    cut = torch.where(choose // 2 % 2 == 1, cut.flip(-2), cut)
    return torch.where(choose // 4 == 1, cut.transpose(-1, -2), cut)

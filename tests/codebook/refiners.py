"""Small refiners with a codebook, and images for them."""

from typing import TypeVar

import torch
import torch.nn.functional as F

from cbnerf.codebook.refiner import CodebookRefiner
from cbnerf.codebook.residual import ResidualRefiner
from cbnerf.overrides import with_overrides
from cbnerf.presets import METHODS
from cbnerf.training.models import build_refiner

Kind = TypeVar("Kind", bound=CodebookRefiner)
SMALL = {"refiner.channels": 6, "refiner.blocks": 2, "codebook.size": 16, "codebook.dim": 4}


def make_refiner(method: str = "cb-nerf", **overrides) -> CodebookRefiner:
    torch.manual_seed(0)
    changes = SMALL | {name.replace("__", "."): value for name, value in overrides.items()}
    refiner = build_refiner(with_overrides(METHODS[method], changes))
    assert isinstance(refiner, CodebookRefiner)
    return refiner


def make_residual(method: str = "cb-nerf", **overrides) -> ResidualRefiner:
    refiner = make_refiner(method, **overrides)
    assert isinstance(refiner, ResidualRefiner)
    return refiner


def wake(refiner: Kind) -> Kind:
    """Fill what is initialised with zeros, as training would."""
    with torch.no_grad():
        for parameter in refiner.parameters():
            if parameter.count_nonzero() == 0:
                parameter.copy_(0.3 * torch.randn_like(parameter))
        if isinstance(refiner, ResidualRefiner):
            refiner.filters.table.normal_(std=0.02)
    return refiner


def place(colours: torch.Tensor, seed: int = 3) -> torch.Tensor:
    """SR images: colours, and positions x and y that grow from pixel to pixel on a rough ground."""
    batch, _, height, width = colours.shape
    generator = torch.Generator().manual_seed(seed)
    start, rough = (torch.rand(batch, 3, *side, generator=generator) for side in
                    ((1, 1), (height, width)))  # fmt: skip
    grid = torch.meshgrid(torch.arange(height) / 32, torch.arange(width) / 32, indexing="ij")
    plane = torch.stack([grid[1], -grid[0], torch.zeros(height, width)])
    return torch.cat([colours, start + plane + 0.05 * rough], dim=1)


def draw_image(height: int, width: int) -> torch.Tensor:
    """An SR image of middling brightness."""
    generator = torch.Generator().manual_seed(2)
    return place(0.25 + 0.5 * torch.rand(1, 3, height, width, generator=generator))


def draw_pair(batch: int = 4, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """SR patches, and HR patches with more detail."""
    generator = torch.Generator().manual_seed(1)
    high_res = torch.rand(batch, 3, size, size, generator=generator)
    return place(F.interpolate(F.avg_pool2d(high_res, 2), scale_factor=2)), high_res

"""Radiance fields: a point in NDC and a direction become density and colour.

Points lie in [-1, 1]^3 after `PlanesField` has divided x and y by the extent of the scene.
"""

import itertools

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cbnerf.config import MLPConfig, PlanesConfig

_AXES = ((0, 1), (0, 2), (1, 2))


class FeaturePlanes(nn.Module):
    """Three axis-aligned feature planes; a point's features are the product of its projections.

    A plane is the sum of `levels` grids, each half as fine as the one before: coarse structure is
    learned first, and fine cells that few rays touch stay smooth.
    """

    def __init__(self, cells: tuple[int, int, int], channels: int, levels: int):
        super().__init__()
        self._sizes = [(cells[b], cells[a]) for a, b in _AXES]
        grids = []
        for (height, width), level in itertools.product(self._sizes, range(levels)):
            shape = (1, channels, -(-height // 2**level), -(-width // 2**level))
            shape = (*shape[:2], max(shape[2], 2), max(shape[3], 2))
            coarsest = level == levels - 1
            grids.append(torch.empty(shape).uniform_(0.1, 0.9) if coarsest else torch.zeros(shape))
        self._levels = levels
        self.grids = nn.ParameterList(grids)

    def compose(self) -> list[Float[Tensor, "1 channels height width"]]:
        """The three planes at their finest size."""
        planes = []
        for axis, size in enumerate(self._sizes):
            fine, *coarser = self.grids[axis * self._levels : (axis + 1) * self._levels]
            for grid in coarser:
                fine = fine + F.interpolate(grid, size, mode="bilinear", align_corners=True)
            planes.append(fine)
        return planes


def interpolate_planes(
    planes: list[Float[Tensor, "1 channels _ _"]], points: Float[Tensor, "points 3"]
) -> Float[Tensor, "points channels"]:
    """Product of the bilinear samples of three planes at the projections of each point."""
    product = None
    for plane, (a, b) in zip(planes, _AXES, strict=True):
        at = torch.stack([points[:, a], points[:, b]], dim=-1)[None, None]
        sampled = F.grid_sample(plane, at, align_corners=True, padding_mode="border")[0, :, 0]
        product = sampled if product is None else product * sampled
    assert product is not None
    return product.T


def total_variation(planes: list[Float[Tensor, "1 channels _ _"]]) -> Float[Tensor, ""]:
    """Mean squared difference of neighbouring cells, summed over planes."""
    terms = [
        plane.diff(dim=2).square().mean() + plane.diff(dim=3).square().mean() for plane in planes
    ]
    return torch.stack(terms).sum()


def density_activation(raw: Tensor) -> Tensor:
    """Softplus, shifted and scaled so that an untrained ray is nearly opaque at its end."""
    return 10 * F.softplus(raw - 1)


class PlanesField(nn.Module):
    """Planes of several cell sizes and two small MLPs (TensoRF, K-Planes)."""

    def __init__(self, config: PlanesConfig, cells: tuple[int, int, int]):
        super().__init__()
        self.planes = nn.ModuleList(
            FeaturePlanes(
                (max(cells[0] // n, 2), max(cells[1] // n, 2), max(cells[2] // n, 2)),
                config.channels, config.levels,
            )
            for n in config.scales
        )  # fmt: skip
        features = config.channels * len(config.scales)
        self.density_net = nn.Sequential(
            nn.Linear(features, config.hidden), nn.ReLU(), nn.Linear(config.hidden, 16)
        )
        self.color_net = nn.Sequential(
            nn.Linear(15 + 9, config.hidden), nn.ReLU(), nn.Linear(config.hidden, 3)
        )

    def compose(self) -> list[list[Tensor]]:
        return [planes.compose() for planes in self.planes]  # type: ignore[operator]

    def forward(
        self,
        composed: list[list[Tensor]],
        points: Float[Tensor, "points 3"],
        directions: Float[Tensor, "points 3"],
    ) -> tuple[Float[Tensor, "points 3"], Float[Tensor, " points"]]:
        """Colour in [0, 1] and density."""
        features = torch.cat([interpolate_planes(p, points) for p in composed], dim=-1)
        hidden = self.density_net(features)
        encoded = torch.cat([hidden[:, 1:], encode(directions, 1)], dim=-1)
        return torch.sigmoid(self.color_net(encoded)), density_activation(hidden[:, 0])


class ProposalField(nn.Module):
    """Density alone, from one small set of planes: shows the sampler where the content is."""

    def __init__(self, cells: tuple[int, int, int]):
        super().__init__()
        self.planes = FeaturePlanes(cells, channels=8, levels=2)
        self.density_net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, points: Float[Tensor, "points 3"]) -> Float[Tensor, " points"]:
        features = interpolate_planes(self.planes.compose(), points)
        return density_activation(self.density_net(features)[:, 0])


def encode(x: Float[Tensor, "*points 3"], frequencies: int) -> Float[Tensor, "*points features"]:
    """x, then sin(2^k x) and cos(2^k x) for each octave; no factor pi (as NeRF-SR's code)."""
    octaves = 2.0 ** torch.arange(frequencies, device=x.device)
    angles = (x[..., None, :] * octaves[:, None]).flatten(-2)
    return torch.cat([x, angles.sin(), angles.cos()], dim=-1)


class MLPField(nn.Module):
    """The network of NeRF: 8 layers of 256 units, the position entering again half-way."""

    def __init__(self, config: MLPConfig):
        super().__init__()
        self._config = config
        position = 3 + 6 * config.position_frequencies
        direction = 3 + 6 * config.direction_frequencies
        self._skip = config.depth // 2
        widths = [position] + [config.width] * (config.depth - 1)
        widths[self._skip] += position
        self.layers = nn.ModuleList(nn.Linear(width, config.width) for width in widths)
        self.density_head = nn.Linear(config.width, 1)
        self.feature = nn.Linear(config.width, config.width)
        self.direction_layer = nn.Linear(config.width + direction, config.width // 2)
        self.rgb_head = nn.Linear(config.width // 2, 3)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(
        self, points: Float[Tensor, "points 3"], directions: Float[Tensor, "points 3"]
    ) -> tuple[Float[Tensor, "points 3"], Float[Tensor, " points"]]:
        """Colour in [0, 1] and raw density, before noise and ReLU."""
        position = encode(points, self._config.position_frequencies)
        hidden = position
        for number, layer in enumerate(self.layers):
            if number == self._skip:
                hidden = torch.cat([position, hidden], dim=-1)
            hidden = F.relu(layer(hidden))
        direction = encode(directions, self._config.direction_frequencies)
        color = torch.cat([self.feature(hidden), direction], dim=-1)
        color = F.relu(self.direction_layer(color))
        return torch.sigmoid(self.rgb_head(color)), self.density_head(hidden)[:, 0]

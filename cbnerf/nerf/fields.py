"""Radiance fields: density and colour of points in NDC, seen from a direction.

Points of the planes lie in [-1, 1]^3: `PlanesModel` divides x and y by the extent that the cameras
see at their depth.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cbnerf.config import MLPConfig, PlanesConfig
from cbnerf.nerf.planes import FeaturePlanes, Planes, interpolate_planes


def density_activation(raw: Tensor) -> Tensor:
    """Softplus, shifted and scaled for rays of length 1."""
    return 10 * F.softplus(raw - 1)


class PlanesField(nn.Module):
    """Planes of several cell sizes and two small MLPs (TensoRF, K-Planes)."""

    def __init__(self, config: PlanesConfig, cells: tuple[int, int, int]):
        super().__init__()
        self.planes = FeaturePlanes(cells, config.channels, config.levels, config.scales)
        features = config.channels * len(config.scales)
        self.density_net = nn.Sequential(
            nn.Linear(features, config.hidden), nn.ReLU(), nn.Linear(config.hidden, 16)
        )
        self.color_net = nn.Sequential(
            nn.Linear(15 + 9, config.hidden), nn.ReLU(), nn.Linear(config.hidden, 3)
        )

    def forward(
        self,
        planes: Planes,
        points: Float[Tensor, "points 3"],
        directions: Float[Tensor, "points 3"],
    ) -> tuple[Float[Tensor, "points 3"], Float[Tensor, " points"]]:
        """Colour in [0, 1] and density, from the composed planes."""
        hidden = self.density_net(interpolate_planes(planes, points))
        encoded = torch.cat([hidden[:, 1:], encode(directions, 1)], dim=-1)
        color = self.color_net(encoded)
        return torch.sigmoid(color.float()), density_activation(hidden[:, 0].float())


class ProposalField(nn.Module):
    """Density alone, from one small set of planes; guides the sampler (mip-NeRF 360)."""

    def __init__(self, cells: tuple[int, int, int]):
        super().__init__()
        self.planes = FeaturePlanes(cells, channels=8, levels=2, scales=(1,))
        self.density_net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(
        self, planes: Planes, points: Float[Tensor, "points 3"]
    ) -> Float[Tensor, " points"]:
        raw = self.density_net(interpolate_planes(planes, points))
        return density_activation(raw[:, 0].float())


def encode(x: Float[Tensor, "*points 3"], frequencies: int) -> Float[Tensor, "*points features"]:
    """Positional encoding: x, then sin(2^k x) and cos(2^k x) for each octave k (NeRF, eq. 4).

    `features` is 3 + 6 * frequencies. Without the factor pi, as in the code of NeRF-SR.
    """
    octaves = 2.0 ** torch.arange(frequencies, device=x.device)
    angles = (x[..., None, :] * octaves[:, None]).flatten(-2)
    return torch.cat([x, angles.sin(), angles.cos()], dim=-1)


class MLPField(nn.Module):
    """The network of NeRF: 8 layers of 256 units with a skip connection of the position."""

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
        color = torch.sigmoid(self.rgb_head(color).float())
        return color, self.density_head(hidden)[:, 0].float()

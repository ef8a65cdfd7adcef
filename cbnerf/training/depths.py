"""Find the depths at which a scene has content, before stage 1 is trained."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cbnerf.config import Config, PlanesConfig
from cbnerf.data.pixels import PixelBatch, PixelSampler
from cbnerf.nerf.depths import PlaneSpace, concentrate
from cbnerf.nerf.fields import PlanesField
from cbnerf.nerf.model import midpoints
from cbnerf.nerf.rays import Cameras, make_rays
from cbnerf.nerf.rendering import composite, reaching_to_infinity, render_weights
from cbnerf.nerf.sampling import sample_stratified
from cbnerf.rng import Rng

_ROUNDS = 2
"""The second round starts from the depths that the first one has found."""
_PIXELS = 256
"""Largest batch."""
_BINS = 32
"""Samples per ray."""
_GRID_LR, _NETWORK_LR = 0.1, 0.012
_PLANES = PlanesConfig(channels=8, levels=2, scales=(1, 4), hidden=16)


def find_depths(
    config: Config,
    cameras: Cameras,
    knots: Float[Tensor, " knots"],
    pixels: PixelSampler,
    device: torch.device,
) -> Float[Tensor, " knots"]:
    """Knots of `cbnerf.nerf.depths` that follow the content of the photographs.

    Trains coarse planes twice for `field.planes.depth_steps`, with one ray per low-res pixel;
    `cameras` are low-res. Every process computes the same.
    """
    knots, steps = knots.to(device), config.field.planes.depth_steps
    batch_size = min(config.field.optim.batch_size, _PIXELS)
    for number in range(_ROUNDS if steps else 0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed + number)
            coarse = _CoarseField(cameras, knots).to(device)
        optimizer = torch.optim.Adam(
            [{"params": coarse.field.planes.parameters(), "lr": _GRID_LR, "eps": 1e-15},
             {"params": [*coarse.field.density_net.parameters(),
                         *coarse.field.color_net.parameters()], "lr": _NETWORK_LR}],
            fused=True,
        )  # fmt: skip
        for step in range(steps):
            rng = Rng(config.seed, number * (steps + 1) + step, device)
            optimizer.zero_grad(set_to_none=True)
            coarse(pixels.draw(batch_size, rng), rng)[0].backward()
            optimizer.step()
        with torch.no_grad():
            rng = Rng(config.seed, number * (steps + 1) + steps, device)
            _, weights = coarse(pixels.draw(16 * batch_size, rng), None)
        knots = concentrate(knots, weights.mean(0))
    return knots


class _CoarseField(nn.Module):
    """Planes of half the size of low-res images, sampled evenly in s without a proposal."""

    def __init__(self, cameras: Cameras, knots: Float[Tensor, " knots"]):
        super().__init__()
        height, width = cameras.size
        self._cameras = cameras
        self.space = PlaneSpace(cameras, knots)
        self.field = PlanesField(_PLANES, (max(width // 2, 2), max(height // 2, 2), _BINS))

    def forward(
        self, batch: PixelBatch, rng: Rng | None
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "pixels bins"]]:
        """The error of some pixels, and the weights of the bins along their rays."""
        count, device = len(batch.rgb), batch.rgb.device
        rays = make_rays(self._cameras, batch.views, batch.columns + 0.5, batch.rows + 0.5)
        jitter = rng.uniform(count, _BINS + 1) if rng else None
        edges = sample_stratified(count, _BINS, jitter, device)
        s = midpoints(edges)
        directions = self.space.directions(rays).repeat_interleave(_BINS, 0)
        points = self.space.points(rays, s).flatten(0, 1)
        rgb, density = self.field(self.field.planes.compose(), points, directions)
        lengths = reaching_to_infinity(edges.diff())
        weights = render_weights(density.view(s.shape), lengths)
        rendering = composite(rgb.view(*s.shape, 3), weights, s)
        return (rendering.rgb - batch.rgb).square().mean(), weights

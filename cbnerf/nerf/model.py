"""A field with its sampler and renderer, and the rendering of whole images.

Rays are grouped by low-res pixel: `[pixels sub_rays 3]`.
"""

import os
from dataclasses import replace
from functools import cache
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cbnerf.config import Config, FieldConfig
from cbnerf.nerf.depths import NUM_KNOTS, PlaneSpace
from cbnerf.nerf.fields import MLPField, PlanesField, ProposalField
from cbnerf.nerf.planes import Planes, total_variation
from cbnerf.nerf.rays import Cameras, Rays, make_sub_pixel_rays
from cbnerf.nerf.rendering import Rendering, composite, reaching_to_infinity, render_weights
from cbnerf.nerf.sampling import prefix_sums, sample_importance, sample_stratified
from cbnerf.rng import Rng

Precision = Literal["bfloat16", "float32"]
AUTO_PRECISION = "CBNERF_AUTO_PRECISION"
"""Environment variable that overrides the precision of `field.precision: auto`."""


class FieldOutput(NamedTuple):
    """Renderings of each pass, the last one is the result; `rays` is pixels times sub-rays."""

    passes: list[Rendering]
    regularization: Float[Tensor, ""]
    """Zero without gradients."""


class Composed(NamedTuple):
    """The composed planes of a `PlanesModel`; constant while its parameters are."""

    field: Planes
    proposal: Planes


class PlanesModel(nn.Module):
    """Factorised planes; the sub-pixel rays of a low-res pixel share one proposal ray."""

    def __init__(self, config: Config, space: PlaneSpace, size: tuple[int, int]):
        super().__init__()
        self._config = config.field
        planes, extent = config.field.planes, space.extent
        self.space = space
        height, width = size
        cells = (
            round(width * planes.cells_per_pixel * float(extent[1, 0])),
            round(height * planes.cells_per_pixel * float(extent[1, 1])),
            planes.depth_cells,
        )
        self.field = PlanesField(planes, cells)
        self.proposal = ProposalField((max(cells[0] // 4, 2), max(cells[1] // 4, 2), cells[2]))

    def compose(self) -> Composed:
        return Composed(self.field.planes.compose(), self.proposal.planes.compose())

    def forward(self, rays: Rays, rng: Rng | None, composed: Composed | None = None) -> FieldOutput:
        """Render rays; pass `composed` to reuse the planes for several batches."""
        pixels, sub_rays, _ = rays.origins.shape
        config, device = self._config, rays.origins.device
        planes, proposal = composed or self.compose()
        num_bins, num_samples = config.num_coarse_samples, config.num_fine_samples

        # Bins and edges are in s (cbnerf.nerf.depths). Proposal: the mean ray of the sub-pixels
        jitter = rng.uniform(pixels, num_bins + 1) if rng else None
        bins = sample_stratified(pixels, num_bins, jitter, device)
        middle = Rays(rays.origins.mean(1), rays.directions.mean(1))
        with autocast(config, device):
            points = self.space.points(middle, midpoints(bins)).flatten(0, 1)
            density = self.proposal(proposal, points)
        lengths = reaching_to_infinity(bins.diff())
        proposed = render_weights(density.view(pixels, num_bins), lengths)

        # field: each sub-ray has its own samples
        bins = bins.repeat_interleave(sub_rays, 0)
        proposed = proposed.repeat_interleave(sub_rays, 0)
        jitter = rng.uniform(pixels, sub_rays, num_samples + 1).flatten(0, 1) if rng else None
        edges = sample_importance(bins, proposed.detach(), num_samples + 1, jitter)
        flat = Rays(rays.origins.flatten(0, 1), rays.directions.flatten(0, 1))
        s = midpoints(edges)
        points = self.space.points(flat, s).flatten(0, 1)
        directions = self.space.directions(flat).repeat_interleave(num_samples, 0)
        with autocast(config, device):
            rgb, density = self.field(planes, points, directions)
        lengths = reaching_to_infinity(edges.diff())
        weights = render_weights(density.view(s.shape), lengths)
        rendering = composite(rgb.view(*s.shape, 3), weights, self.space.to_t(s))

        if not torch.is_grad_enabled():
            return FieldOutput([rendering], regularization=density.new_zeros(()))
        outside = proposal_loss(bins, proposed, edges, weights.detach())
        return FieldOutput(
            passes=[rendering],
            regularization=config.planes.tv_weight * total_variation(planes) + outside,
        )


class MLPModel(nn.Module):
    """NeRF's coarse and fine networks; each sub-ray has its own samples in both passes."""

    def __init__(self, config: Config):
        super().__init__()
        self._config = config.field
        self.coarse = MLPField(config.field.mlp)
        self.fine = MLPField(config.field.mlp)

    def forward(self, rays: Rays, rng: Rng | None) -> FieldOutput:
        pixels, sub_rays, _ = rays.origins.shape
        config = self._config

        def draw(width: int) -> Tensor | None:
            return rng.uniform(pixels, sub_rays, width).flatten(0, 1) if rng else None

        def noise_for(samples: int) -> Tensor | None:
            return rng.normal(pixels, sub_rays, samples).flatten(0, 1) if rng else None

        flat = Rays(rays.origins.flatten(0, 1), rays.directions.flatten(0, 1))
        num_coarse, num_fine = config.num_coarse_samples, config.num_fine_samples
        device = flat.origins.device
        t = sample_stratified(pixels * sub_rays, num_coarse - 1, draw(num_coarse), device)
        coarse, weights = _render_mlp(self.coarse, flat, t, noise_for(num_coarse), config)
        added = sample_importance(midpoints(t), weights[:, 1:-1].detach(), num_fine, draw(num_fine))
        t = torch.cat([t, added], dim=-1).sort(dim=-1).values
        fine, _ = _render_mlp(self.fine, flat, t, noise_for(num_coarse + num_fine), config)
        return FieldOutput(passes=[coarse, fine], regularization=coarse.rgb.new_zeros(()))


FieldModel = PlanesModel | MLPModel


def build_field(
    config: Config, cameras: Cameras, knots: Float[Tensor, " knots"] | None = None
) -> FieldModel:
    """The untrained field of a configuration; `knots` say at which depths planes have cells, by
    default evenly in disparity."""
    if config.field.kind == "mlp":
        return MLPModel(config)
    even = torch.linspace(0, 1, NUM_KNOTS, device=cameras.camera_to_world.device)
    space = PlaneSpace(cameras, even if knots is None else knots)
    return PlanesModel(config, space, cameras.size)


def autocast(config: FieldConfig, device: torch.device) -> torch.autocast:
    """The precision of the networks' matrix products."""
    is_short = resolve_precision(config, device) == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=is_short)


def resolve_precision(config: FieldConfig, device: torch.device) -> Precision:
    """`field.precision`, or what `auto` is on a device."""
    if config.precision != "auto":
        return config.precision
    match os.environ.get(AUTO_PRECISION):
        case None:
            return "bfloat16" if multiplies_bfloat16(device) else "float32"
        case "bfloat16" | "float32" as told:
            return told
        case other:
            raise ValueError(f"{AUTO_PRECISION} = {other!r} must be bfloat16 or float32")


def settle_precision(config: Config, device: torch.device) -> Config:
    """The configuration with `auto` replaced by the precision of a device, so that other machines
    compute the same."""
    precision = resolve_precision(config.field, device)
    return replace(config, field=replace(config.field, precision=precision))


@cache
def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has bfloat16 instructions; emulation is far slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Before get_capabilities came, torch did not tell.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "bf16"))


def midpoints(edges: Float[Tensor, "*rays edges"]) -> Float[Tensor, "*rays bins"]:
    return (edges[..., 1:] + edges[..., :-1]) / 2


def proposal_loss(
    bins: Float[Tensor, "rays bins_plus_1"],
    proposed: Float[Tensor, "rays bins"],
    edges: Float[Tensor, "rays samples_plus_1"],
    weights: Float[Tensor, "rays samples"],
) -> Float[Tensor, ""]:
    """Penalty where the proposed weights are no upper envelope of the field's weights
    (mip-NeRF 360, eq. 13)."""
    cumulative = prefix_sums(proposed)
    bins, edges = bins.contiguous(), edges.contiguous()
    last = proposed.shape[-1]
    first_bin = torch.searchsorted(bins, edges[:, :-1].contiguous(), right=True).sub(1)
    end_bin = torch.searchsorted(bins, edges[:, 1:].contiguous())
    bound = cumulative.gather(-1, end_bin.clamp(0, last)) - cumulative.gather(
        -1, first_bin.clamp(0, last)
    )
    return ((weights - bound).clamp_min(0).square() / (weights + 1e-5)).sum(-1).mean()


def _render_mlp(
    field: MLPField,
    rays: Rays,
    t: Float[Tensor, "rays samples"],
    density_noise: Float[Tensor, "rays samples"] | None,
    config: FieldConfig,
) -> tuple[Rendering, Float[Tensor, "rays samples"]]:
    points = rays.origins[:, None] + t[..., None] * rays.directions[:, None]
    directions = rays.directions[:, None].expand_as(points)
    with autocast(config, points.device):
        rgb, raw = field(points.flatten(0, 1), directions.flatten(0, 1))
    raw = raw.view(t.shape)
    if density_noise is not None:
        raw = raw + config.mlp.density_noise * density_noise
    lengths = reaching_to_infinity(torch.nn.functional.pad(t.diff(), (0, 1)))
    weights = render_weights(torch.relu(raw), lengths)
    return composite(rgb.view(*t.shape, 3), weights, t), weights


@torch.no_grad()
def render_image(
    model: FieldModel, cameras: Cameras, view: int, scale: int, *, chunk: int = 8192
) -> tuple[Float[Tensor, "height width 3"], Float[Tensor, "height width"]]:
    """Colour in [0, 1] and NDC depth t of a view.

    `cameras` have the size of the output; each low-res pixel covers scale x scale of its pixels.
    `chunk` limits the rays that are rendered at once.
    """
    height, width = cameras.size[0] // scale, cameras.size[1] // scale
    device = cameras.camera_to_world.device
    pixels = torch.arange(height * width, device=device)
    chosen = torch.arange(scale * scale, device=device)
    rgb, depth = [], []
    prepared = (model.compose(),) if isinstance(model, PlanesModel) else ()
    for part in pixels.split(max(chunk // scale**2, 1)):
        rays = make_sub_pixel_rays(
            cameras, torch.full_like(part, view), part // width, part % width, scale,
            chosen.expand(len(part), -1),
        )  # fmt: skip
        rendering = model(rays, None, *prepared).passes[-1]
        rgb.append(rendering.rgb)
        depth.append(rendering.depth)
    return (
        _join_sub_pixels(torch.cat(rgb).clamp(0, 1), height, width, scale),
        _join_sub_pixels(torch.cat(depth)[:, None], height, width, scale)[..., 0],
    )


def _join_sub_pixels(flat: Tensor, height: int, width: int, scale: int) -> Tensor:
    """`[pixels x sub_pixels channels]` to `[height x scale, width x scale, channels]`."""
    grouped = flat.view(height, width, scale, scale, -1)
    return grouped.permute(0, 2, 1, 3, 4).reshape(height * scale, width * scale, -1)

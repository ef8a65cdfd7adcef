"""Stage 1: train a radiance field on the low-res pixels of a scene."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cbnerf.config import Config
from cbnerf.data.pixels import PixelSampler
from cbnerf.data.scene import Scene
from cbnerf.data.splits import split_views
from cbnerf.nerf.depths import spread_over_bounds
from cbnerf.nerf.model import FieldModel, build_field, resolve_precision
from cbnerf.nerf.rays import Cameras, make_sub_pixel_rays
from cbnerf.nerf.rendering import super_sampling_loss
from cbnerf.nerf.sampling import choose_sub_pixels
from cbnerf.rng import Rng
from cbnerf.training.depths import find_depths
from cbnerf.training.divergence import DivergenceCheck
from cbnerf.training.evaluation import mean_scores, render_views
from cbnerf.training.loop import (
    DrawLosses,
    Losses,
    Report,
    Task,
    deterministic_if_configured,
    fit,
    num_steps,
)

_PROBES = 256
"""Minimum sample size of the divergence check, in pixels."""


@deterministic_if_configured
def train_field(
    config: Config,
    scene: Scene,
    *,
    device: torch.device,
    report: Report,
    resume_from: Path | None = None,
    part: int = 1,
) -> FieldModel:
    """Train on low-res photographs only; validation views are scored at high resolution.

    With `part` the training stops after the first 1/`part` of its steps and can be resumed.
    FloatingPointError if it diverges.
    Reports `train/loss`, `train/psnr` (of low-res pixels, dB), `val/psnr` (dB) and `val/ssim`.
    """
    split = split_views(scene.num_views, config.data)
    cameras = scene.cameras(device)
    pixels = PixelSampler(scene, split.train, config.data.low_res_kernel, device)
    knots = None
    if config.field.kind == "planes" and resume_from is None:  # a checkpoint holds them
        low_res = low_res_cameras(cameras, scene.scale)
        knots = find_depths(config, low_res, spread_over_bounds(scene.nears), pixels, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_field(config, cameras, knots).to(device)
    losses = _pixel_losses(config, cameras, scene.scale, pixels)

    def evaluate() -> dict[str, float]:
        if not split.val:
            return {}
        renders = render_views(model, cameras, split.val, scene.scale)
        return mean_scores(renders.rgb, scene.images[split.val], "val")

    task = Task(
        stage="field",
        scene=scene.name,
        config=config,
        precision=resolve_precision(config.field, device),
        optim=config.field.optim,
        steps=num_steps(config, "field", [scene]),
        model=model,
        param_groups=_param_groups(model, config),
        losses=losses,
        evaluate=evaluate,
        cameras=cameras._asdict(),
        check=_divergence_check(config, model, losses, pixels, device),
    )
    fit(task, device=device, report=report, resume_from=resume_from, part=part)
    return model


def _pixel_losses(config: Config, cameras: Cameras, scale: int, pixels: PixelSampler) -> DrawLosses:
    """The loss on random pixels: with super-sampling of `scale` x `scale` sub-pixel rays each."""
    if not config.field.super_sampling:
        cameras, scale = low_res_cameras(cameras, scale), 1
    num_sub_pixels = scale**2
    num_chosen = min(config.field.sub_rays or num_sub_pixels, num_sub_pixels)

    def losses(wrapped: nn.Module, batch_size: int, rng: Rng) -> Losses:
        batch = pixels.draw(batch_size, rng)
        scores = rng.uniform(batch_size, num_sub_pixels)
        chosen = choose_sub_pixels(scores, num_chosen, opposite=config.field.opposite_sub_rays)
        rays = make_sub_pixel_rays(cameras, batch.views, batch.rows, batch.columns, scale, chosen)
        output = wrapped(rays, rng)
        errors = [super_sampling_loss(rendering.rgb, batch.rgb) for rendering in output.passes]
        total = torch.stack(errors).sum() + output.regularization
        parts = {"train/loss": total, "train/psnr": -10 * torch.log10(errors[-1].detach())}
        return Losses(total, parts)

    return losses


def _divergence_check(
    config: Config,
    model: FieldModel,
    losses: DrawLosses,
    pixels: PixelSampler,
    device: torch.device,
) -> DivergenceCheck:
    """Compares the error on a fixed sample of pixels with that of their mean colour."""
    num_probes = max(config.field.optim.batch_size, _PROBES)

    def probe() -> Rng:
        return Rng(config.seed, 0, device)

    def error() -> Tensor:
        with torch.no_grad():
            parts = losses(model, num_probes, probe()).parts
        return 10 ** (-parts["train/psnr"] / 10)

    probes = pixels.draw(num_probes, probe()).rgb
    return DivergenceCheck(error, (probes - pixels.mean()).square().mean())


def low_res_cameras(cameras: Cameras, scale: int) -> Cameras:
    """The same cameras with low-res pixels."""
    return cameras._replace(
        intrinsics=cameras.intrinsics / scale,
        size=(cameras.size[0] // scale, cameras.size[1] // scale),
    )


def _param_groups(model: FieldModel, config: Config) -> list[dict[str, Any]]:
    """Parameter groups: feature planes and the small networks have different learning rates."""
    rate, planes = config.field.optim.lr, config.field.planes
    if config.field.kind == "mlp":
        return [{"params": list(model.parameters()), "lr": rate}]
    grids, networks = [], []
    for name, parameter in model.named_parameters():
        (grids if "grids" in name else networks).append(parameter)
    # Gradients of cells are tiny, so epsilon must be smaller (Instant-NGP).
    return [
        {"params": grids, "lr": rate * planes.grid_lr, "eps": 1e-15},
        {"params": networks, "lr": rate * planes.network_lr},
    ]

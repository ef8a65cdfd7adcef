"""Evaluation of trained models on whole views: renders, refined images, scores, image strips."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from cbnerf.codebook.refiner import DEFAULT_TILE, Refiner
from cbnerf.codebook.views import MadeOnDemand
from cbnerf.data.renders import Renders
from cbnerf.metrics import flip, psnr, ssim, to_8bit
from cbnerf.nerf.model import FieldModel, render_image
from cbnerf.nerf.rays import Cameras
from cbnerf.nerf.warp import find_positions
from cbnerf.progress import progress


class Score(NamedTuple):
    """Quality of one view."""

    psnr: float
    """In dB."""
    ssim: float
    flip: float | None = None
    """FLIP, lower is better; None if not requested or not installed."""


def render_views(model: FieldModel, cameras: Cameras, views: list[int], scale: int) -> Renders:
    """Stage-1 renders at high resolution."""
    rgb, positions = [], []
    for view in progress(views, "rendering views"):
        color, depth = render_image(model, cameras, view, scale)
        rgb.append(to_8bit(color).cpu())
        positions.append(find_positions(cameras, depth, view).half().cpu())
    return Renders(torch.stack(rgb), torch.stack(positions))


@torch.no_grad()
def refine_views(
    refiner: Refiner,
    renders: Renders,
    device: torch.device,
    references: UInt8[Tensor, "views references height width 3"] | None = None,
    *,
    tile: int = DEFAULT_TILE,
) -> UInt8[Tensor, "views height width 3"]:
    """Refined images, one view at a time; `references` come from `find_references`.

    Codebook refiners process tiles of `tile` pixels per side.
    """
    refined = []
    for view, render in enumerate(progress(sr_views(renders, device), "refining views")):
        own = None if references is None else to_unit(references[view], device)[None]
        image = refiner.refine(render, own, tile=tile)
        refined.append(to_8bit(image)[0].movedim(0, -1).cpu())
    return torch.stack(refined) if refined else renders.rgb


def to_unit(
    images: UInt8[Tensor, "*images height width 3"], device: torch.device
) -> Float[Tensor, "images 3 height width"]:
    """Channels first, in [0, 1]; a single image becomes a batch of one."""
    batch = images if images.ndim == 4 else images[None]
    return batch.to(device).movedim(-1, 1).float() / 255


def unit_views(
    images: UInt8[Tensor, "views height width 3"], device: torch.device
) -> Sequence[Float[Tensor, "1 3 height width"]]:
    """Each view as `to_unit` returns it, computed at every access."""
    return MadeOnDemand(lambda view: to_unit(images[view], device), range(len(images)))


def sr_views(renders: Renders, device: torch.device) -> Sequence[Float[Tensor, "1 6 height width"]]:
    """Each view as refiners take it, computed at every access: colours, then positions."""

    def join(view: int) -> Tensor:
        positions = renders.positions[view].to(device).movedim(-1, 0)[None].float()
        return torch.cat([to_unit(renders.rgb[view], device), positions], dim=1)

    return MadeOnDemand(join, range(len(renders.rgb)))


def score_views(
    images: UInt8[Tensor, "views height width 3"],
    targets: UInt8[Tensor, "views height width 3"],
    *,
    perceptual: bool = False,
) -> list[Score]:
    """One score per view, on full images; `perceptual` adds FLIP, at twice the cost of SSIM."""
    return [
        Score(psnr(image, target), ssim(image, target), flip(image, target) if perceptual else None)
        for image, target in zip(images, targets, strict=True)
    ]


def mean_score(scores: list[Score]) -> Score:
    """Means over views."""
    flips = [score.flip for score in scores if score.flip is not None]
    return Score(
        psnr=sum(score.psnr for score in scores) / len(scores),
        ssim=sum(score.ssim for score in scores) / len(scores),
        flip=sum(flips) / len(flips) if flips else None,
    )


def mean_scores(
    images: UInt8[Tensor, "views height width 3"],
    targets: UInt8[Tensor, "views height width 3"],
    prefix: str,
) -> dict[str, float]:
    """Means over views as `prefix/psnr` (dB) and `prefix/ssim`; empty without views."""
    scores = score_views(images, targets)
    if not scores:
        return {}
    mean = mean_score(scores)
    return {f"{prefix}/psnr": mean.psnr, f"{prefix}/ssim": mean.ssim}


def image_strip(
    images: list[UInt8[Tensor, "height width 3"]], gap: int = 4
) -> UInt8[Tensor, "height total_width 3"]:
    """Images side by side with white gaps."""
    white = torch.full((images[0].shape[0], gap, 3), 255, dtype=torch.uint8)
    parts = [part for image in images for part in (image, white)]
    return torch.cat(parts[:-1], dim=1)

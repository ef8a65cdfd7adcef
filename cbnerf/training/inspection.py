"""Inspection of a trained codebook: its codes, and their use in whole views."""

from pathlib import Path

import imageio.v3 as iio
import torch
from jaxtyping import UInt8
from torch import Tensor

from cbnerf.codebook.encoders import STRIDE, VQAutoencoder, to_signed
from cbnerf.codebook.health import CodebookHealth
from cbnerf.data.renders import Renders
from cbnerf.metrics import to_8bit
from cbnerf.training.evaluation import image_strip, sr_views, unit_views
from cbnerf.training.pictures import color_codes, draw_agreement, draw_codes, draw_map, draw_usage

CODES_FILE, USAGE_FILE, MAP_FILE = "codes.png", "usage.png", "map.png"


@torch.no_grad()
def inspect_codebook(
    autoencoder: VQAutoencoder,
    renders: Renders,
    photographs: UInt8[Tensor, "views height width 3"],
    folder: Path,
    device: torch.device,
) -> dict[str, float]:
    """Write `codes.png`, `usage.png` and, of the first view, `map.png`; return the codebook's
    health over all views.

    The map shows photograph | its codes | render | its codes | white where they agree.
    """
    autoencoder.eval()
    stride = autoencoder.encoder.stride
    colors = color_codes(autoencoder.quantizer.codes())
    health = CodebookHealth(len(colors))
    strip: list[Tensor] = []
    views = zip(sr_views(renders, device), unit_views(photographs, device), strict=True)
    for sr, high_res in views:
        found = autoencoder(to_signed(_crop(sr)), to_signed(_crop(high_res)))
        health.add(found.high_res_indices, found.sr_indices)
        if not strip:
            render, photograph = (
                to_8bit(_crop(image)[0, :3]).movedim(0, -1).cpu() for image in (sr, high_res)
            )
            of_photograph, of_render = found.high_res_indices[0], found.sr_indices[0]
            strip = [
                photograph, draw_map(of_photograph, colors, stride), render,
                draw_map(of_render, colors, stride),
                draw_agreement(of_photograph, of_render, stride),
            ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    order = health.high_res_counts.argsort(descending=True, stable=True)
    iio.imwrite(folder / CODES_FILE, draw_codes(autoencoder, order).numpy())
    iio.imwrite(folder / USAGE_FILE, draw_usage(health.high_res_counts, health.sr_counts).numpy())
    iio.imwrite(folder / MAP_FILE, image_strip(strip).numpy())
    return health.metrics()


def _crop(images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    return images[..., : height // STRIDE * STRIDE, : width // STRIDE * STRIDE]

"""Inspection of a trained codebook: its codes, and their use in whole views."""

from pathlib import Path

import imageio.v3 as iio
import torch
from jaxtyping import UInt8
from torch import Tensor

from cbnerf.codebook.encoders import STRIDE, VQAutoencoder, to_signed
from cbnerf.codebook.health import CodebookHealth
from cbnerf.training.evaluation import image_strip, to_unit
from cbnerf.training.pictures import color_codes, draw_agreement, draw_codes, draw_map, draw_usage

CODES_FILE, USAGE_FILE, MAP_FILE = "codes.png", "usage.png", "map.png"


@torch.no_grad()
def inspect_codebook(
    autoencoder: VQAutoencoder,
    renders: UInt8[Tensor, "views height width 3"],
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
    for render, photograph in zip(renders, photographs, strict=True):
        render, photograph = _crop(render), _crop(photograph)
        pair = (to_signed(to_unit(image, device)) for image in (render, photograph))
        found = autoencoder(*pair)
        health.add(found.high_res_indices, found.sr_indices)
        if not strip:
            high_res, sr = found.high_res_indices[0], found.sr_indices[0]
            strip = [
                photograph, draw_map(high_res, colors, stride), render,
                draw_map(sr, colors, stride), draw_agreement(high_res, sr, stride),
            ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    order = health.high_res_counts.argsort(descending=True, stable=True)
    iio.imwrite(folder / CODES_FILE, draw_codes(autoencoder, order).numpy())
    iio.imwrite(folder / USAGE_FILE, draw_usage(health.high_res_counts, health.sr_counts).numpy())
    iio.imwrite(folder / MAP_FILE, image_strip(strip).numpy())
    return health.metrics()


def _crop(image: Tensor) -> Tensor:
    height, width, _ = image.shape
    return image[: height // STRIDE * STRIDE, : width // STRIDE * STRIDE]

"""Pictures of a codebook: its codes as patches, their usage, and maps of the codes of an image.

Pictures are uint8 `[height width 3]`. *Counts* are the uses of each code, `[codes]`.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from cbnerf.codebook.encoders import LIGHT_SIDE, VQAutoencoder
from cbnerf.metrics import to_8bit

_PHOTOGRAPH, _RENDER, _INK = (70, 110, 170), (225, 120, 40), (40, 40, 40)


@torch.no_grad()
def draw_codes(
    autoencoder: VQAutoencoder, order: Int[Tensor, " codes"], *, side: int = 3, zoom: int = 2
) -> UInt8[Tensor, "height width 3"]:
    """Codes decoded as patches of `side x side` equal codes, in reading order of `order`; with one
    code per pixel, as the patch that a single code decodes to among zeros.

    Contrast is stretched about mid-grey, by the same factor for all.
    """
    around = 4  # codes that keep the decoder's padding out of the patch
    width, stride = side + 2 * around, autoencoder.encoder.stride
    codes = autoencoder.quantizer.codes()[order]
    latents = codes[:, None, None].expand(-1, width, width, -1)
    cut = slice(around * stride, (around + side) * stride)
    if stride == 1:
        alone = F.one_hot(torch.tensor(width // 2), width).to(latents)
        latents = latents * (alone[:, None] * alone)[..., None]
        cut = slice((width - LIGHT_SIDE) // 2, (width + LIGHT_SIDE) // 2)
    patches = torch.cat([autoencoder.decode(part).image for part in latents.split(256)])
    patches = patches[..., cut, cut]
    patches = patches / torch.quantile(patches.abs().flatten()[:: len(patches)], 0.995)
    return _tile(to_8bit((patches + 1) / 2).movedim(1, -1).cpu(), zoom)


def _tile(
    patches: UInt8[Tensor, "patches size size 3"], zoom: int
) -> UInt8[Tensor, "height width 3"]:
    """A square sheet with white gaps."""
    columns = math.ceil(math.sqrt(len(patches)))
    rows = math.ceil(len(patches) / columns)
    patches = patches.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    size = patches.shape[1] + 2
    sheet = patches.new_full((rows * columns, size, size, 3), 255)
    sheet[: len(patches), 1:-1, 1:-1] = patches
    sheet = sheet.view(rows, columns, size, size, 3).permute(0, 2, 1, 3, 4)
    return sheet.reshape(rows * size, columns * size, 3)


def draw_usage(
    high_res_counts: Int[Tensor, " codes"], sr_counts: Int[Tensor, " codes"]
) -> UInt8[Tensor, "height width 3"]:
    """Share of each code, most used first: bars for photographs, dots for renders; log scale."""
    left, top, width, height = 60, 30, 720, 300
    order = high_res_counts.argsort(descending=True, stable=True)
    shares = [(counts / counts.sum())[order].tolist() for counts in (high_res_counts, sr_counts)]
    lowest = math.floor(math.log10(0.5 / float(high_res_counts.sum())))
    image = Image.new("RGB", (left + width + 20, top + height + 40), "white")
    draw = ImageDraw.Draw(image)

    def y_of(share: float) -> float:
        return top + height * math.log10(share) / lowest

    def x_of(rank: int) -> float:
        return left + width * rank / len(order)

    for exponent in range(lowest, 1):
        y = y_of(10.0**exponent)
        draw.line((left, y, left + width, y), fill=(225, 225, 225))
        draw.text((left - 8, y), f"1e{exponent}" if exponent else "1", _INK, anchor="rm")
    for rank, (photograph, render) in enumerate(zip(*shares, strict=True)):
        if photograph:
            right = max(x_of(rank + 1) - 1, x_of(rank))
            draw.rectangle((x_of(rank), y_of(photograph), right, top + height), _PHOTOGRAPH)
        if render:
            x, y = (x_of(rank) + x_of(rank + 1)) / 2, y_of(render)
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), _RENDER)
    draw.text((left, 8), "share of places, photographs", _PHOTOGRAPH)
    draw.text((left + 220, 8), "renders", _RENDER)
    draw.text((left, top + height + 10), f"{len(order)} codes, most used first", _INK)
    return torch.from_numpy(np.array(image))


def color_codes(codes: Float[Tensor, "codes dim"]) -> UInt8[Tensor, "codes 3"]:
    """Similar codes get similar colours: their ranks along three principal axes."""
    centered = (codes - codes.mean(0)).cpu()
    axes = torch.linalg.svd(centered, full_matrices=False).Vh[:3]
    ranks = (centered @ axes.T).argsort(0).argsort(0) / (len(codes) - 1)
    return to_8bit(F.pad(ranks, (0, 3 - len(axes)), value=0.5))


def draw_map(
    indices: Int[Tensor, "rows columns"], colors: UInt8[Tensor, "codes 3"], stride: int
) -> UInt8[Tensor, "height width 3"]:
    """The colour of each code, at the pixels that it describes."""
    return _enlarge(colors[indices.cpu()], stride)


def draw_agreement(
    first: Int[Tensor, "rows columns"], second: Int[Tensor, "rows columns"], stride: int
) -> UInt8[Tensor, "height width 3"]:
    """White where both are the same code."""
    agree = (first == second).to(torch.uint8).mul(255)
    return _enlarge(agree[..., None].expand(-1, -1, 3).cpu(), stride)


def _enlarge(picture: Tensor, stride: int) -> Tensor:
    return picture.repeat_interleave(stride, 0).repeat_interleave(stride, 1)

"""Figures of a comparison: the same crop of every system, and error maps.

The crop depends on the photograph only: the window with the largest error after downsampling to low
resolution and enlarging again, which is where there is most to restore.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_GAP, _MARGIN, _LABEL = 6, 12, 20
_CROP_WIDTH, _MAP_WIDTH = 192, 240
LARGEST_ERROR = 0.25
"""The mean absolute error of the three colours that is white in an error map."""
RULE = (
    "View: the first that is scored and not nerf-sr's reference. Crop: the window, an eighth of "
    "the width and 16 pixels at least, that loses most when the photograph is shrunk to low "
    "resolution by a box and enlarged by a bicubic filter; no system takes part in the choice."
)


class Panel(NamedTuple):
    """One picture of a figure with the lines below it."""

    image: Image.Image
    lines: tuple[str, ...] = ()


def choose_crop(
    photograph: UInt8[Tensor, "height width 3"], scale: int, side: int
) -> tuple[int, int]:
    """Top and left of the square window of `side` pixels with most detail beyond low resolution."""
    image = photograph.movedim(-1, 0)[None].float()
    smooth = F.interpolate(
        F.avg_pool2d(image, scale), size=image.shape[-2:], mode="bicubic", align_corners=False
    )
    lost = (image - smooth).square().mean(1, keepdim=True).double()
    energy = F.avg_pool2d(lost, side, stride=1)[0, 0]
    best = int(energy.argmax())
    return best // energy.shape[1], best % energy.shape[1]


def crop_side(width: int) -> int:
    """Side in pixels of the crops of an image."""
    return max(width // 8, 16)


def cut_crop(
    image: UInt8[Tensor, "height width 3"], place: tuple[int, int], side: int
) -> Image.Image:
    """A crop, enlarged without smoothing."""
    top, left = place
    crop = Image.fromarray(image[top : top + side, left : left + side].contiguous().numpy())
    return crop.resize((_CROP_WIDTH, _CROP_WIDTH), Image.Resampling.NEAREST)


def mark_crop(
    photograph: UInt8[Tensor, "height width 3"], place: tuple[int, int], side: int
) -> Image.Image:
    """The whole photograph at the height of a crop, with a frame around the crop."""
    height, width, _ = photograph.shape
    factor = _CROP_WIDTH / height
    picture = Image.fromarray(photograph.numpy())
    picture = picture.resize((round(width * factor), _CROP_WIDTH), Image.Resampling.LANCZOS)
    top, left = (value * factor for value in place)
    box = (left - 1, top - 1, left + side * factor, top + side * factor)
    ImageDraw.Draw(picture).rectangle(box, outline=(255, 40, 40), width=2)
    return picture


def error_map(
    image: UInt8[Tensor, "height width 3"], target: UInt8[Tensor, "height width 3"]
) -> Image.Image:
    """Mean absolute error of the colours of each pixel, from black over red and yellow to white."""
    error = (image.float() - target.float()).abs().mean(-1) / 255
    picture = Image.fromarray(_heat(error / LARGEST_ERROR).numpy())
    size = (_MAP_WIDTH, round(_MAP_WIDTH * image.shape[0] / image.shape[1]))
    enlarges = picture.width < _MAP_WIDTH
    return picture.resize(size, Image.Resampling.NEAREST if enlarges else Image.Resampling.BOX)


def error_scale() -> Image.Image:
    """The colours of an error map from 0 to `LARGEST_ERROR`."""
    ramp = torch.linspace(0, 1, _MAP_WIDTH).expand(12, -1)
    return Image.fromarray(_heat(ramp).contiguous().numpy())


def _heat(values: Float[Tensor, "height width"]) -> UInt8[Tensor, "height width 3"]:
    """Colours of values in [0, 1]: red rises first, then green, then blue."""
    rising = torch.stack([values * 3, values * 3 - 1, values * 3 - 2], dim=-1)
    return (rising.clamp(0, 1) * 255).round().to(torch.uint8)


def draw_grid(
    header: Sequence[str], rows: Sequence[tuple[str, Sequence[Panel]]], footer: Panel | None = None
) -> Image.Image:
    """Panels in columns below a header, with the name of each row on the left."""
    font = ImageFont.load_default(13)
    columns = [
        max(max(panels[column].image.width for _, panels in rows), round(font.getlength(title)))
        for column, title in enumerate(header)
    ]
    names = max(round(font.getlength(name)) for name, _ in rows) + _MARGIN
    lines = max(len(panel.lines) for _, panels in rows for panel in panels)
    heights = [max(p.image.height for p in panels) + lines * _LABEL for _, panels in rows]
    footing = footer.image.height + _LABEL + _GAP if footer else 0
    width = 2 * _MARGIN + names + sum(columns) + _GAP * (len(columns) - 1)
    height = 2 * _MARGIN + _LABEL + sum(heights) + _GAP * (len(rows) - 1) + footing
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)

    lefts = [_MARGIN + names + sum(columns[:n]) + _GAP * n for n in range(len(columns))]
    for left, column, title in zip(lefts, columns, header, strict=True):
        draw.text((left + column / 2, _MARGIN), title, "black", font, anchor="ma")
    top = _MARGIN + _LABEL
    for (name, panels), row_height in zip(rows, heights, strict=True):
        draw.text((_MARGIN, top + row_height / 2), name, "black", font, anchor="lm")
        for left, column, panel in zip(lefts, columns, panels, strict=True):
            picture.paste(panel.image, (left + (column - panel.image.width) // 2, top))
            for number, line in enumerate(panel.lines):
                below = top + panel.image.height + 2 + number * _LABEL
                draw.text((left + column / 2, below), line, "black", font, anchor="ma")
        top += row_height + _GAP
    if footer:
        picture.paste(footer.image, (lefts[0], top))
        draw.text((lefts[0], top + footer.image.height + 2), footer.lines[0], "black", font)
    return picture

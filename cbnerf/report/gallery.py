"""A gallery: views of scenes as several systems show them, to compare with a slider.

It is one piece of a page, without anything from the network; `gallery.html` holds its style and
script. Each view is drawn at native pixels with two of its images on either side of a slider; what
lies under the pointer is enlarged for all of them, and a key shows their errors instead.
"""

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any, NamedTuple

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from cbnerf.report.figures import LARGEST_ERROR
from cbnerf.report.page import Chart, data_uri

PHOTOGRAPH = "photograph"
"""Name of the image that the error maps of the others are relative to."""
BUDGET = 4_400_000
"""Maximum bytes of a gallery's images on a page that also embeds plotly's script (4.8 MB)."""
_TEMPLATE, _FIGURES, _LARGEST = "gallery.html", "<!-- figures -->", "LARGEST_ERROR"
_FORMATS: list[tuple[str, dict[str, Any]]] = [
    ("lossless WebP", {"kind": "WEBP", "lossless": True, "quality": 0, "method": 0}),
    *(
        (f"JPEG of quality {quality}, which smooths a little",
         {"kind": "JPEG", "quality": quality, "subsampling": 0})
        for quality in (98, 95, 92, 90, 85, 80, 70, 60)
    ),
]  # fmt: skip
"""Formats in words and for Pillow, the most exact first; colours have the full resolution."""


class Shot(NamedTuple):
    """One image of a view."""

    name: str
    note: str
    """A few words beside the name; may be empty."""
    image: UInt8[Tensor, "height width 3"]


class View(NamedTuple):
    title: str
    shots: Sequence[Shot]
    """Of equal size; the first two are compared at first."""


def gallery(caption: str, views: Sequence[View], budget: int = BUDGET) -> Chart:
    """A gallery in the most exact format in which its images take at most `budget` bytes, or in the
    last format if none is small enough. The caption names the format."""
    shots = [shot for view in views for shot in view.shots]
    images = [Image.fromarray(shot.image.contiguous().numpy()) for shot in shots]
    uris, words = _encode(images, budget)
    remaining = iter(uris)
    figures = "\n".join(_figure(view, [next(remaining) for _ in view.shots]) for view in views)
    template = (files("cbnerf.report") / _TEMPLATE).read_text(encoding="utf-8")
    html = template.replace(_LARGEST, str(LARGEST_ERROR)).replace(_FIGURES, figures)
    usage = (
        "Move the slider, or drag in the image; the place under the pointer is enlarged beside it. "
        f"Key e: errors, from black over red and yellow to white ({LARGEST_ERROR} of the range and "
        f"more). Native pixels, {words}."
    )
    return Chart("Gallery", f"{caption} {usage}", html)


def _encode(images: Sequence[Image.Image], budget: int) -> tuple[list[str], str]:
    """Data URIs of images, and their format in words."""
    *exact, (last, options) = _FORMATS
    for words, better in exact:
        uris, left = [], budget
        for image in images:
            uris.append(data_uri(image, **better))
            left -= len(uris[-1])
            if left < 0:
                break
        else:
            return uris, words
    return [data_uri(image, **options) for image in images], last


def _figure(view: View, uris: Sequence[str]) -> str:
    images = "\n".join(
        f'<img data-name="{escape(shot.name)}" alt="{escape(_label(shot))}" src="{uri}">'
        for shot, uri in zip(view.shots, uris, strict=True)
    )
    return f"<figure><figcaption>{escape(view.title)}</figcaption>\n{images}\n</figure>"


def _label(shot: Shot) -> str:
    return f"{shot.name}, {shot.note}" if shot.note else shot.name

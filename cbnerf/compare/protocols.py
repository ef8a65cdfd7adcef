"""Protocols: which views train, which are scored, and how their scores are summarised.

Numbers of different protocols are not comparable, so a report has one protocol. Images are 8 bit.
"""

import math
from collections.abc import Sequence
from typing import Literal

from jaxtyping import UInt8
from torch import Tensor

from cbnerf.config import Config, DataConfig
from cbnerf.data.library import PAPER_SCENES
from cbnerf.data.splits import split_views
from cbnerf.overrides import with_overrides

Protocol = Literal["holdout", "unseen-scene", "low-res-only", "table1"]

WITHOUT_PHOTOGRAPH: tuple[Protocol, ...] = ("unseen-scene", "low-res-only")
"""Protocols that train on no high-res photograph of the scene that is scored."""

DESCRIPTIONS: dict[Protocol, str] = {
    "holdout": (
        "Every 8th view from index 0 is scored and trains nothing; stage 1 sees low-res images "
        "only, stage 2 high-res patches of the training views. Means over full held-out images, "
        "clamped, 8 bit, in [0, 1]."
    ),
    "unseen-scene": (
        "As holdout, but stage 2 is trained on the photographs of the other scenes only: no "
        "high-res image of the scored scene is used. Its low-res photographs, which train stage 1, "
        "constrain the refined images (refiner.consistency)."
    ),
    "low-res-only": (
        "As holdout, but no high-res image is used at all: stage 2 is trained one scale below, on "
        "the low-res photographs of the scene and the renders of another stage 1, which is trained "
        "on these photographs at an even lower resolution. They also constrain the refined images "
        "(refiner.consistency)."
    ),
    "table1": (
        "The released scoring of Codebook-NeRF, for the published comparison only: all views train "
        "and the same views are scored; PSNR of images in [-1, 1] with peak 1, which is 6.02 dB "
        "lower than the usual one; the maximum over views and over the evaluations of stage 2, "
        "not a mean. It does not measure novel views, and its numbers are not "
        "comparable with those of another protocol. For nerf-sr the best view may be the "
        "reference photograph itself. Differs from the released scoring: values are clamped and "
        "8 bit, and stage 2 is trained on all views."
    ),
}

_NUMBERS = {
    "NeRF-SR": (19.70, 24.59, 26.95, 24.93, 16.99, 20.21, 28.78, 24.81),
    "Codebook-NeRF": (20.45, 24.88, 27.38, 24.97, 16.10, 18.37, 30.26, 24.52),
}
PUBLISHED: dict[str, dict[str, float]] = {
    system: dict(zip(PAPER_SCENES, numbers, strict=True)) for system, numbers in _NUMBERS.items()
}
"""Table 1 of Codebook-NeRF (KSC 2024), by system and scene, in dB."""


def adapt(config: Config, protocol: Protocol) -> Config:
    """The configuration with the split of a protocol."""
    if protocol != "table1":
        return config
    return with_overrides(config, {"data.test_every": 0, "data.validation": False})


def scored_views(num_views: int, data: DataConfig, protocol: Protocol) -> list[int]:
    """Indices of the test views; with `table1` of all views, which are the training views."""
    split = split_views(num_views, data)
    return split.train if protocol == "table1" else split.test


def released_psnr(
    image: UInt8[Tensor, "height width 3"], target: UInt8[Tensor, "height width 3"]
) -> float:
    """PSNR in dB as in the released code: values in [-1, 1] with a peak of 1."""
    signed = [pixels.double() / 127.5 - 1 for pixels in (image, target)]
    error = (signed[0] - signed[1]).square().mean().item()
    return -10 * math.log10(error) if error else math.inf


def summarise(views: Sequence[dict[str, float]], protocol: Protocol) -> dict[str, float]:
    """Each metric as its mean over views, with `table1` as its maximum."""
    values = {metric: [view[metric] for view in views] for metric in views[0]}
    if protocol == "table1":
        return {metric: max(numbers) for metric, numbers in values.items()}
    return {metric: sum(numbers) / len(numbers) for metric, numbers in values.items()}

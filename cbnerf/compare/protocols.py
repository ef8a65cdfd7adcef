"""Protocols: what trains, what is scored, and how the scores of views become one number.

A number belongs to one protocol; a report holds one protocol. Images are 8 bit, as saved.
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
"""Protocols in which a scene gives no high-res photograph."""

DESCRIPTIONS: dict[Protocol, str] = {
    "holdout": (
        "Every 8th view from index 0 is scored and trains nothing; stage 1 sees low-res images "
        "only, stage 2 high-res patches of the training views. Means over full held-out images, "
        "clamped, 8 bit, in [0, 1]."
    ),
    "unseen-scene": (
        "As holdout, but stage 2 is trained on the photographs of the other scenes only: the scene "
        "that is scored has given no high-res image at all. Its low-res photographs, which stage 1 "
        "has seen, have a say (refiner.consistency)."
    ),
    "low-res-only": (
        "As holdout, but no high-res image is seen at all: stage 2 is trained a scale below, on "
        "the low-res photographs of the scene and the renders of another stage 1, which has seen "
        "them at lower resolution still; they have a say at their own scale, too "
        "(refiner.consistency)."
    ),
    "table1": (
        "The released scoring of Codebook-NeRF, for the published comparison only: all views train "
        "and the same views are scored; PSNR of images in [-1, 1] with peak 1, which is 6.02 dB "
        "lower than the usual one; the maximum over views and over the evaluations of stage 2, "
        "not a mean. It says nothing about views that were not trained on, and its numbers must "
        "not be set beside those of another protocol. For nerf-sr the best view may be the very "
        "photograph that it is given. Differs from the released scoring: values are clamped and "
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
    """A configuration with the split of a protocol."""
    if protocol != "table1":
        return config
    return with_overrides(config, {"data.test_every": 0, "data.validation": False})


def scored_views(num_views: int, data: DataConfig, protocol: Protocol) -> list[int]:
    """Test views; under `table1` all, which are the training views."""
    split = split_views(num_views, data)
    return split.train if protocol == "table1" else split.test


def released_psnr(
    image: UInt8[Tensor, "height width 3"], target: UInt8[Tensor, "height width 3"]
) -> float:
    """PSNR in dB as the released code has it: values in [-1, 1], but a peak of 1."""
    signed = [pixels.double() / 127.5 - 1 for pixels in (image, target)]
    error = (signed[0] - signed[1]).square().mean().item()
    return -10 * math.log10(error) if error else math.inf


def summarise(views: Sequence[dict[str, float]], protocol: Protocol) -> dict[str, float]:
    """One number for each metric: the mean over views, under `table1` the maximum."""
    values = {metric: [view[metric] for view in views] for metric in views[0]}
    if protocol == "table1":
        return {metric: max(numbers) for metric, numbers in values.items()}
    return {metric: sum(numbers) / len(numbers) for metric, numbers in values.items()}

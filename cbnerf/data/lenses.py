"""Lenses: intrinsics with OpenCV's radial and tangential distortion, and its removal.

Image points (u, v) have the centre of the first pixel at (0.5, 0.5), as in COLMAP.
"""

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image

_NEWTON_STEPS = 30
_TOLERANCE = 1e-7
_BORDER_POINTS = 65


class Lens(NamedTuple):
    """The lens and the image size of a camera, in its pixels."""

    width: float
    height: float
    fx: float
    fy: float
    cx: float
    cy: float
    distortion: tuple[float, float, float, float, float] = (0.0, 0.0, 0.0, 0.0, 0.0)
    """k1, k2, p1, p2, k3 of OpenCV."""

    @classmethod
    def centred(cls, width: float, height: float, focal: float) -> "Lens":
        """One focal length and the principal point in the middle."""
        return cls(width, height, focal, focal, width / 2, height / 2)

    @property
    def matrix(self) -> Float[np.ndarray, "4"]:
        """fx, fy, cx, cy."""
        return np.array([self.fx, self.fy, self.cx, self.cy])

    def resized(self, width: int, height: int) -> "Lens":
        """The lens in pixels of another image size."""
        x, y = width / self.width, height / self.height
        return Lens(width, height, self.fx * x, self.fy * y, self.cx * x, self.cy * y,
                    self.distortion)  # fmt: skip

    def distort(self, slopes: Float[np.ndarray, "*points 2"]) -> Float[np.ndarray, "*points 2"]:
        """Distorted slopes (x to the right, y down, per depth) of rays with these slopes."""
        k1, k2, p1, p2, k3 = self.distortion
        x, y = slopes[..., 0], slopes[..., 1]
        square = x * x + y * y
        radial = 1 + square * (k1 + square * (k2 + square * k3))
        return np.stack(
            [
                x * radial + 2 * p1 * x * y + p2 * (square + 2 * x * x),
                y * radial + p1 * (square + 2 * y * y) + 2 * p2 * x * y,
            ],
            axis=-1,
        )


@lru_cache(maxsize=256)
def without_distortion(lens: Lens) -> Lens:
    """The lens of the undistorted photograph: of the same size, without blank pixels.

    The image is enlarged (fx and fy alike) until the photograph covers it, and moved as little as
    possible. ValueError for a distortion that folds the image over.
    """
    if not any(lens.distortion):
        return lens
    width, height = lens.width, lens.height
    across, down = np.linspace(0, width, _BORDER_POINTS), np.linspace(0, height, _BORDER_POINTS)
    left, right = (_undistort(lens, np.full_like(down, u), down)[:, 0] for u in (0, width))
    top, bottom = (_undistort(lens, across, np.full_like(across, v))[:, 1] for v in (0, height))
    x, y = (left.max(), right.min()), (top.max(), bottom.min())
    zoom = max(width / lens.fx / (x[1] - x[0]), height / lens.fy / (y[1] - y[0]))
    fx, fy = lens.fx * zoom, lens.fy * zoom
    cx = np.clip(lens.cx, width - fx * x[1], -fx * x[0])
    cy = np.clip(lens.cy, height - fy * y[1], -fy * y[0])
    return Lens(width, height, float(fx), float(fy), float(cx), float(cy))


def undistort(photograph: Image.Image, lens: Lens) -> Image.Image:
    """The photograph resampled for `without_distortion(lens)`."""
    if not any(lens.distortion):
        return photograph
    lens = lens.resized(*photograph.size)
    pixels = torch.from_numpy(np.array(photograph)).movedim(-1, 0)[None].float()
    sampled = torch.nn.functional.grid_sample(
        pixels, _sampling_grid(lens), mode="bicubic", padding_mode="border", align_corners=False
    )
    return Image.fromarray(_to_bytes(sampled))


def _to_bytes(image: torch.Tensor) -> UInt8[np.ndarray, "height width 3"]:
    return image[0].movedim(0, -1).round().clamp(0, 255).byte().numpy()


@lru_cache(maxsize=2)  # the photographs of a scene mostly share their lens
def _sampling_grid(lens: Lens) -> Float[torch.Tensor, "1 height width 2"]:
    """For each pixel of the undistorted photograph its place in the photograph, in [-1, 1]."""
    straight = without_distortion(lens)
    u, v = np.meshgrid(np.arange(lens.width) + 0.5, np.arange(lens.height) + 0.5)
    slopes = np.stack([(u - straight.cx) / straight.fx, (v - straight.cy) / straight.fy], axis=-1)
    seen = lens.distort(slopes) * [lens.fx, lens.fy] + [lens.cx, lens.cy]
    return torch.from_numpy(2 * seen / [lens.width, lens.height] - 1).float()[None]


def _undistort(
    lens: Lens, u: Float[np.ndarray, " points"], v: Float[np.ndarray, " points"]
) -> Float[np.ndarray, "points 2"]:
    """Slopes of the rays that are seen at (u, v), by Newton's method along each border."""
    target = np.stack([(u - lens.cx) / lens.fx, (v - lens.cy) / lens.fy], axis=1)
    slopes, small = target.copy(), 1e-6
    for _ in range(_NEWTON_STEPS):
        columns = [
            (lens.distort(slopes + step) - lens.distort(slopes - step)) / (2 * small)
            for step in small * np.eye(2)
        ]
        jacobian, error = np.stack(columns, axis=2), lens.distort(slopes) - target
        slopes = slopes - np.linalg.solve(jacobian, error[..., None])[..., 0]
    ordered = all(a < b for a, b in pairwise(slopes[:, int(np.ptp(u) == 0)]))
    if not ordered or np.abs(lens.distort(slopes) - target).max() > _TOLERANCE:
        raise ValueError(f"the distortion {lens.distortion} folds the image over")
    return slopes

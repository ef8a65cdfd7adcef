"""Checks of cameras, for readers of all formats."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from cbnerf.data.scene import recenter

# Larger than the error of rotations in float32 or in text with six digits.
_ROTATION_TOLERANCE = 1e-3

MAX_ANGLE = 75.0
"""Largest angle in degrees between the axis of the average camera and a ray. NDC can represent
angles below 90; at 75 a pixel covers 15 times the area that it covers in the middle (1 / cos^2),
and feature planes grow as much."""


def check_rotations(rotations: Float[np.ndarray, "views 3 3"], file: Path) -> None:
    """ValueError for a matrix that is mirrored, scaled, sheared or zero."""
    off = np.abs(rotations.transpose(0, 2, 1) @ rotations - np.eye(3)).max(axis=(1, 2))
    signs = np.linalg.det(rotations)
    for row in np.flatnonzero(~(off <= _ROTATION_TOLERANCE) | (signs < 0)):
        lengths = ", ".join(f"{length:.3g}" for length in np.linalg.norm(rotations[row], axis=0))
        problem = (
            "mirrors space"
            if off[row] <= _ROTATION_TOLERANCE
            else f"is no rotation: its axes have lengths {lengths}, or are not at right angles"
        )
        raise ValueError(
            f"{file}: the pose of row {row} (counted from 0) {problem}; write it with LLFF's "
            "imgs2poses"
        )


def check_forward_facing(
    camera_to_world: Float[np.ndarray, "views 3 4"],
    intrinsics: Float[np.ndarray, "views 4"],
    size: tuple[float, float],
    file: Path,
) -> None:
    """ValueError for cameras with rays beyond `MAX_ANGLE` from the axis of the average camera.

    `size` is height and width in pixels.
    """
    height, width = size
    fx, fy, cx, cy = intrinsics.T
    # Rays within an angle of an axis form a convex cone, so the corners of the image suffice.
    points = [(cx, cy), *product((0, width), (0, height))]
    rays = np.stack(
        [np.stack([(u - cx) / fx, (cy - v) / fy, -np.ones_like(cx)], axis=1) for u, v in points]
    )
    rays /= np.linalg.norm(rays, axis=2, keepdims=True)
    backward = recenter(torch.from_numpy(camera_to_world))[:, 2, :3].double().numpy()
    angles = np.degrees(np.arccos(np.clip(-(backward * rays).sum(2).T, -1, 1)))
    widest = angles[:, 1:].max(axis=1)
    row = int(widest.argmax())
    if widest[row] > MAX_ANGLE:
        raise ValueError(
            f"{file}: the camera of row {row} (counted from 0) looks {angles[row, 0]:.0f} degrees "
            f"beside the average camera and sees as far as {math.ceil(widest[row])}; a scene must "
            f"be forward-facing, all within {MAX_ANGLE:.0f} degrees: photograph it from one side"
        )

"""Depth bounds of views whose files contain none."""

import numpy as np
from jaxtyping import Float

_PERCENTILES = (1, 99)
"""Of depths. Outliers of the matching lie beyond; LLFF's 0.1 and 99.9 would keep some."""
_NEAR_MARGIN = 0.75
"""Near bound as a share of the near percentile: surfaces without features have no points, and may
be nearer. Measured in benchmarks/results/cameras/x2-128.md: 1 costs room .4 dB, 0.5 costs ollie
.5."""
_FEWEST_POINTS = 20
"""Minimum number of points from which the bounds of a view are estimated."""
_NEAR_SHARE, _FAR_SHARE = 0.25, 4.0
"""Guessed bounds as shares of the distance of the subject."""


def bounds_of_points(
    camera_to_world: Float[np.ndarray, "views 3 4"],
    seen: list[Float[np.ndarray, "_ 3"]],
) -> Float[np.ndarray, "views 2"]:
    """Robust percentiles of the depths of the points that each view sees, the near one with a
    margin.

    Views that see too few take the widest bounds of the others.
    """
    bounds = guess_bounds(camera_to_world)
    enough = np.zeros(len(seen), dtype=bool)
    for view, (pose, points) in enumerate(zip(camera_to_world, seen, strict=True)):
        depths = (pose[:, 3] - points) @ pose[:, 2]
        depths = depths[depths > 0]
        enough[view] = len(depths) >= _FEWEST_POINTS
        if enough[view]:
            bounds[view] = np.percentile(depths, _PERCENTILES) * [_NEAR_MARGIN, 1]
    if enough.any():
        bounds[~enough] = bounds[enough, 0].min(), bounds[enough, 1].max()
    return bounds


def guess_bounds(camera_to_world: Float[np.ndarray, "views 3 4"]) -> Float[np.ndarray, "views 2"]:
    """Depths between which content may lie, from the cameras alone.

    The subject is assumed where the optical axes meet (the point nearest to all of them), and the
    nearest content at a quarter of its distance: nearer content would be lost, while loose bounds
    cost little. The near bound is at least half the largest distance between two cameras.
    """
    axes, origins = -camera_to_world[:, :, 2], camera_to_world[:, :, 3]
    apart = float(np.linalg.norm(origins[:, None] - origins, axis=2).max()) or 1.0
    across = np.eye(3) - axes[:, :, None] * axes[:, None]
    # The small weight of a place ahead keeps the system regular where all axes are parallel.
    weight, ahead = 1e-6 * len(axes), origins.mean(0) + apart * axes.mean(0)
    subject = np.linalg.solve(
        across.sum(0) + weight * np.eye(3),
        (across @ origins[:, :, None]).sum(0)[:, 0] + weight * ahead,
    )
    depths = ((subject - origins) * axes).sum(1)
    near = max(_NEAR_SHARE * float(depths.min()), 0.5 * apart)
    return np.stack([np.full(len(axes), near), np.maximum(_FAR_SHARE * depths, 2 * near)], axis=1)

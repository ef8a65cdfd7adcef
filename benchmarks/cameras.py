"""Cameras of one scene folder against those of another, after the best similarity.

    python benchmarks/cameras.py --found scenes/fern --official ../shared/llff/fern

Views are compared in their order. Centres differ by a share of the extent, which is the largest
distance between two official centres; angles are between the axes of both cameras.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from cbnerf.data.captures import read_capture


@dataclass(kw_only=True)
class Options:
    found: Path
    """Scene folder."""
    official: Path
    """Scene folder of the same photographs."""
    width: int = 504
    """Image width in pixels, for focal lengths."""


def align(source: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Scale, rotation and shift that move points `[points 3]` nearest to others (Umeyama, 1991)."""
    centred, aimed = source - source.mean(0), target - target.mean(0)
    left, spread, right = np.linalg.svd(aimed.T @ centred)
    sign = np.array([1, 1, np.linalg.det(left @ right)])
    rotation = left @ np.diag(sign) @ right
    scale = float((spread * sign).sum() / (centred**2).sum())
    return scale, rotation, target.mean(0) - scale * rotation @ source.mean(0)


def main(options: Options) -> None:
    found, official = (
        read_capture(path, options.width) for path in (options.found, options.official)
    )
    poses = found.camera_to_world.double().numpy(), official.camera_to_world.double().numpy()
    scale, rotation, shift = align(poses[0][:, :, 3], poses[1][:, :, 3])
    centres = scale * poses[0][:, :, 3] @ rotation.T + shift
    target = poses[1][:, :, 3]
    extent = np.linalg.norm(target[:, None] - target, axis=2).max()
    off = np.linalg.norm(centres - target, axis=1) / extent
    axes = np.einsum("ij,vj,vi->v", rotation, poses[0][:, :, 2], poses[1][:, :, 2])
    angles = np.degrees(np.arccos(np.clip(axes, -1, 1)))
    focal = [float(capture.intrinsics[:, 0].median()) for capture in (found, official)]
    near = scale * float(found.bounds.min()), float(official.bounds.min())
    print(f"{options.official.name}: {len(off)} views")
    print(f"centres off by {100 * np.sqrt((off**2).mean()):.3f} % of the extent (rms), "
          f"{100 * off.max():.3f} % at most")  # fmt: skip
    print(f"axes off by {angles.mean():.3f} degrees on average, {angles.max():.3f} at most")
    print(f"focal length {focal[0]:.2f} against {focal[1]:.2f} pixels at {options.width}")
    print(f"nearest depth {near[0]:.3f} against {near[1]:.3f}")


if __name__ == "__main__":
    main(tyro.cli(Options))

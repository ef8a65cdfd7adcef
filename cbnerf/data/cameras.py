"""The cameras of a scene folder as its files hold them, and the checks for all formats."""

import math
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from cbnerf.data.lenses import Lens, without_distortion
from cbnerf.data.scene import recenter

# Larger than the error of rotations in float32 or in text with six digits.
_ROTATION_TOLERANCE = 1e-3
_NARROWEST = 1.0
"""Smallest field of view in degrees; below it the focal length must be wrong."""

MAX_ANGLE = 75.0
"""Largest angle in degrees between the axis of the average camera and a ray. NDC can represent
angles below 90; at 75 a pixel covers 15 times the area that it covers in the middle (1 / cos^2),
and feature planes grow as much."""


class Registration(NamedTuple):
    """The cameras of a scene folder, one entry for each photograph."""

    files: list[Path]
    """Files that the cameras are read from; messages name the first."""
    names: list[str] | None
    """Paths of the photographs relative to the scene folder; None: the files of an image folder, in
    order."""
    camera_to_world: Float[np.ndarray, "views 3 4"]
    lenses: list[Lens]
    bounds: Float[np.ndarray, "views 2"]
    note: str = ""
    """What is ignored in the files, in words; empty if nothing."""

    def label(self, view: int) -> str:
        """A view, for messages."""
        return self.names[view] if self.names else f"row {view} (counted from 0)"

    def of(self, views: list[int]) -> "Registration":
        """The cameras of some of the views, in this order."""
        return self._replace(
            names=[self.names[view] for view in views] if self.names else None,
            camera_to_world=self.camera_to_world[views],
            lenses=[self.lenses[view] for view in views],
            bounds=self.bounds[views],
        )

    def sorted(self) -> "Registration":
        """In the order of the photographs' names; ValueError for two cameras of one photograph."""
        if self.names is None:
            return self
        ordered = self.of(sorted(range(len(self.names)), key=self.names.__getitem__))
        for name, after in pairwise(ordered.names or []):
            if name == after:
                raise ValueError(f"{self.files[0]}: {name} has two cameras")
        return ordered


def check_registration(cameras: Registration) -> None:
    """ValueError for cameras that cannot have photographed a forward-facing scene."""
    if not cameras.lenses:
        raise ValueError(f"{cameras.files[0]}: holds no cameras")
    lenses = np.array([[*lens[:6], *lens.distortion] for lens in cameras.lenses])
    poses = cameras.camera_to_world.reshape(-1, 12)
    table = np.concatenate([poses, lenses, cameras.bounds], axis=1)
    with np.errstate(over="ignore", invalid="ignore"):  # Scenes are float32: 1e39 is not finite.
        finite = np.isfinite(table.astype(np.float32).sum(axis=1))
    _check_views(cameras, finite, "holds values that are not finite")
    in_order = (cameras.bounds[:, 0] > 0) & (cameras.bounds[:, 1] > cameras.bounds[:, 0])
    _check_views(cameras, in_order, "its bounds must satisfy 0 < near < far")
    positive = lenses[:, :4].min(axis=1) > 0
    _check_views(cameras, positive, "height, width and focal must be positive")
    longest = (lenses[:, :2] / lenses[:, 2:4]).max(axis=1)
    narrowest = 2 * math.tan(math.radians(_NARROWEST / 2))
    _check_views(cameras, longest > narrowest, f"sees less than {_NARROWEST:g} degree")
    _check_distortion(cameras)
    _check_rotations(cameras)
    _check_forward_facing(cameras)


def _check_views(cameras: Registration, good: np.ndarray, problem: str) -> None:
    if not good.all():
        raise ValueError(f"{cameras.files[0]}: {cameras.label(int(good.argmin()))}: {problem}")


def _check_distortion(cameras: Registration) -> None:
    for view, lens in enumerate(cameras.lenses):
        try:
            without_distortion(lens)
        except ValueError as error:
            where = f"{cameras.files[0]}: {cameras.label(view)}"
            raise ValueError(f"{where}: {error}; undistort the photographs") from None


def _check_rotations(cameras: Registration) -> None:
    """ValueError for a matrix that is mirrored, scaled, sheared or zero."""
    rotations = cameras.camera_to_world[:, :, :3]
    off = np.abs(rotations.transpose(0, 2, 1) @ rotations - np.eye(3)).max(axis=(1, 2))
    signs = np.linalg.det(rotations)
    for view in np.flatnonzero(~(off <= _ROTATION_TOLERANCE) | (signs < 0)):
        lengths = ", ".join(f"{length:.3g}" for length in np.linalg.norm(rotations[view], axis=0))
        problem = (
            "mirrors space"
            if off[view] <= _ROTATION_TOLERANCE
            else f"is no rotation: its axes have lengths {lengths}, or are not at right angles"
        )
        raise ValueError(
            f"{cameras.files[0]}: the pose of {cameras.label(int(view))} {problem}; write the "
            "cameras again"
        )


def _check_forward_facing(cameras: Registration) -> None:
    """ValueError for cameras with rays beyond `MAX_ANGLE` from the axis of the average camera."""
    axes, corners = view_angles(cameras)
    view = int(corners.argmax())
    if corners[view] > MAX_ANGLE:
        raise ValueError(
            f"{cameras.files[0]}: the camera of {cameras.label(view)} looks {axes[view]:.0f} "
            f"degrees beside the average camera and sees as far as {math.ceil(corners[view])}; a "
            f"scene must be forward-facing, all within {MAX_ANGLE:.0f} degrees: photograph it from "
            "one side"
        )


def view_angles(
    cameras: Registration,
) -> tuple[Float[np.ndarray, " views"], Float[np.ndarray, " views"]]:
    """Angles in degrees between the axis of the average camera and each camera's own axis, and
    the farthest corner of its photograph."""
    rays = np.array([_corner_rays(without_distortion(lens)) for lens in cameras.lenses])
    rays /= np.linalg.norm(rays, axis=2, keepdims=True)
    backward = recenter(torch.from_numpy(cameras.camera_to_world))[:, 2, :3].double().numpy()
    angles = np.degrees(np.arccos(np.clip(-(rays @ backward[:, :, None])[..., 0], -1, 1)))
    # Rays within an angle of an axis form a convex cone, so the corners of the image suffice.
    return angles[:, 0], angles[:, 1:].max(axis=1)


def _corner_rays(lens: Lens) -> list[tuple[float, float, float]]:
    """Directions of the axis and of the four corners, in camera axes."""
    points = [(lens.cx, lens.cy), *product((0, lens.width), (0, lens.height))]
    return [((u - lens.cx) / lens.fx, (lens.cy - v) / lens.fy, -1.0) for u, v in points]

"""Camera paths for videos of novel views."""

import math

import torch

from cbnerf.nerf.rays import Cameras


def spiral_path(cameras: Cameras, num_frames: int, *, focus_depth: float = 3.5) -> Cameras:
    """One turn of a spiral around the average camera; all frames look at one point.

    The radii are 0.7 times the 90th percentile of the cameras' distances along each axis; the focus
    lies `focus_depth` scene units in front of the average camera. Intrinsics are the median. (After
    the videos of NeRF and LLFF.)
    """
    positions = cameras.camera_to_world[:, :, 3]
    # Stay between the photographs: the field is unconstrained elsewhere.
    radii = 0.7 * torch.quantile(positions.abs(), 0.9, dim=0)
    focus = positions.new_tensor([0.0, 0.0, -focus_depth])
    poses = []
    for frame in range(num_frames):
        angle = 2 * math.pi * frame / num_frames
        turn = positions.new_tensor([math.cos(angle), math.sin(angle), math.sin(2 * angle)])
        origin = radii * turn
        backward = torch.nn.functional.normalize(origin - focus, dim=0)
        right = torch.linalg.cross(positions.new_tensor([0.0, 1.0, 0.0]), backward)
        right = torch.nn.functional.normalize(right, dim=0)
        up = torch.linalg.cross(backward, right)
        poses.append(torch.stack([right, up, backward, origin], dim=1))
    intrinsics = cameras.intrinsics.median(0).values.repeat(num_frames, 1)
    return cameras._replace(camera_to_world=torch.stack(poses), intrinsics=intrinsics)

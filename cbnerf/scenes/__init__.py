"""Eight built-in forward-facing scenes with parallax, occlusion and fine texture; no download.

`worlds` builds each scene from solids, `shapes` and `textures` define the solids, and `raycasting`
renders the photographs. A world does not depend on the resolution, and all random numbers are
seeded, so equal calls return equal bits.
"""

import math
from random import Random

import torch
from jaxtyping import Float
from torch import Tensor

from cbnerf.scenes.raycasting import Camera, World, light
from cbnerf.scenes.worlds import BUILDERS

_FIELD_OF_VIEW = 62.0
_FOCUS = (0.0, 0.0, -4.6)
_CAMERA_SPREAD = (0.5, 0.36, 0.04)
_LAMP_PIXELS = 1024

BUILT_IN_SCENES: tuple[str, ...] = tuple(sorted(BUILDERS))


def make_world(name: str) -> World:
    """The solids of a built-in scene under their lamp."""
    if name not in BUILDERS:
        raise ValueError(f"unknown scene {name!r}; built in are {', '.join(BUILT_IN_SCENES)}")
    build, lamp = BUILDERS[name]
    pose = _aim(torch.tensor(lamp), torch.tensor(_FOCUS))
    return light(build(), Camera(pose, 0.6 * _LAMP_PIXELS, _LAMP_PIXELS, _LAMP_PIXELS))


def make_camera(pose: Float[Tensor, "3 4"], width: int) -> Camera:
    """A 4:3 camera of a phone's field of view."""
    focal = 0.5 * width / math.tan(math.radians(_FIELD_OF_VIEW / 2))
    return Camera(pose, focal, width, round(width * 3 / 4))


def place_cameras(num_views: int) -> Float[Tensor, "views 3 4"]:
    """Camera-to-world poses on a sunflower spiral, all looking about at the focus.

    Every fourth view, which splits hold out, takes a place nearer to the centre, so that training
    views surround it.
    """
    held_out = list(range(0, num_views, 4))
    ranks = dict(zip(held_out, range(0, 2 * len(held_out), 2), strict=True))
    free = iter(sorted(set(range(num_views)) - set(ranks.values())))
    random, poses = Random(0), []
    for view in range(num_views):
        rank = ranks[view] if view in ranks else next(free)
        radius, angle = math.sqrt((rank + 0.5) / num_views), rank * math.pi * (3 - math.sqrt(5))
        place_in_disc = (radius * math.cos(angle), radius * math.sin(angle), random.uniform(-1, 1))
        position = torch.tensor(place_in_disc) * torch.tensor(_CAMERA_SPREAD)
        wobble = torch.tensor([random.uniform(-0.08, 0.08) for _ in range(3)])
        poses.append(_aim(position, torch.tensor(_FOCUS) + wobble))
    return torch.stack(poses)


def _aim(position: Float[Tensor, "3"], target: Float[Tensor, "3"]) -> Float[Tensor, "3 4"]:
    """The upright pose at `position` that looks at `target`."""
    back = torch.nn.functional.normalize(position - target, dim=0)
    right = torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0]), back)
    right = torch.nn.functional.normalize(right, dim=0)
    return torch.stack([right, torch.linalg.cross(back, right), back, position], dim=1)

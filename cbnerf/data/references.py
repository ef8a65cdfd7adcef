"""References for NeRF-SR's refiner: patches of one high-res photograph with the same content.

The photograph of the first training view is the reference of the whole scene. For a tile of another
view, some of its pixels, the anchors, are projected into the photograph by their depth, and patches
are copied from there without resampling.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float16, UInt8
from torch import Tensor

from cbnerf.config import Config, DataConfig
from cbnerf.data.patches import check_patch_size
from cbnerf.data.renders import Renders
from cbnerf.data.scene import Scene
from cbnerf.data.splits import split_views
from cbnerf.nerf.rays import Cameras, project
from cbnerf.nerf.warp import find_points
from cbnerf.rng import Rng

_WARP = 0.075
"""Largest entries of a random perspective: corners move by up to a third of half a patch."""


class ReferenceBatch(NamedTuple):
    """Values in [0, 1]."""

    sr: Float[Tensor, "patches 3 size size"]
    high_res: Float[Tensor, "patches 3 size size"]
    references: Float[Tensor, "patches references 3 size size"]


class ReferencePatchSampler:
    """Training pairs of the reference view, warped, with references nearby that are not warped.

    A target is never its own reference: it is warped, and its references are displaced.
    """

    def __init__(
        self,
        render: UInt8[Tensor, "height width 3"],
        photograph: UInt8[Tensor, "height width 3"],
        config: Config,
        device: torch.device,
    ):
        self._size, self._count = config.refiner.patch_size, config.refiner.references
        check_patch_size(self._size, photograph)
        pair = torch.cat([render, photograph], dim=2).movedim(-1, 0)
        self._pair = pair.to(device).float() / 255

    def draw(self, batch_size: int, rng: Rng) -> ReferenceBatch:
        """A batch at uniformly random places."""
        _, height, width = self._pair.shape
        corner = torch.stack(
            [rng.integers(height - self._size + 1, batch_size),
             rng.integers(width - self._size + 1, batch_size)], dim=1,
        )  # fmt: skip
        cut = self._cut_warped(corner, rng.uniform(batch_size, 6))
        moves = rng.integers(2 * self._size + 1, batch_size, self._count, 2) - self._size
        references = self._cut(corner[:, None] + moves)
        return ReferenceBatch(cut[:, :3], cut[:, 3:], references)

    def _cut_warped(
        self, corner: Tensor, numbers: Float[Tensor, "patches 6"]
    ) -> Float[Tensor, "patches 6 size size"]:
        """Render and photograph through one random perspective each; edges are repeated."""
        size, (_, height, width) = self._size, self._pair.shape
        turn, tilt = (_WARP * (numbers * 2 - 1)).split([4, 2], dim=1)
        axis = (torch.arange(size, device=corner.device) + 0.5) * 2 / size - 1
        square = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).flatten(0, 1)
        matrix = torch.eye(2, device=corner.device) + turn.view(-1, 2, 2)
        warped = (square @ matrix.mT) / (1 + square @ tilt[:, :, None])
        place = corner.flip(1)[:, None] + (warped + 1) * size / 2
        grid = place * 2 / place.new_tensor([width, height]) - 1
        cut = F.grid_sample(
            self._pair[None], grid[None], padding_mode="border", align_corners=False
        )
        return cut[0].movedim(0, 1).unflatten(-1, (size, size))

    def _cut(self, corners: Tensor) -> Float[Tensor, "patches references 3 size size"]:
        """Patches of the photograph with these corners (row, column), moved inside the image."""
        _, height, width = self._pair.shape
        steps = torch.arange(self._size, device=corners.device)
        top = corners[..., 0].clamp(0, height - self._size)
        left = corners[..., 1].clamp(0, width - self._size)
        channels = torch.arange(3, 6, device=corners.device)[:, None, None]
        rows = (top[..., None] + steps)[..., None, :, None]
        columns = (left[..., None] + steps)[..., None, None, :]
        return self._pair[channels, rows, columns]


def reference_view(scene: Scene, data: DataConfig) -> int:
    """The view whose photograph the references are cut from."""
    return split_views(scene.num_views, data).train[0]


def find_references(
    config: Config, scene: Scene, renders: Renders, views: list[int]
) -> UInt8[Tensor, "views references height width 3"] | None:
    """References of some views; None if the refiner of `config` does not use references."""
    if config.refiner.kind != "reference" or not views:
        return None
    source = reference_view(scene, config.data)
    tile, count = config.refiner.patch_size, config.refiner.references
    found = [
        move_tiles(
            scene.images[source],
            find_content(scene.cameras(), view, renders.depth[view], source),
            tile, count,
        )
        for view in views
    ]  # fmt: skip
    return torch.stack(found)


def find_content(
    cameras: Cameras, view: int, depth: Float16[Tensor, "height width"], source: int
) -> Float[Tensor, "height width 2"]:
    """Position (u, v) in the view `source` of the content of each pixel of a view."""
    # Differs from reference: t is depth along the axis of the average camera, not of the view.
    t = depth.float().clamp(max=0.999)
    return project(find_points(cameras, t, view), cameras, source)


def move_tiles(
    photograph: UInt8[Tensor, "height width 3"],
    places: Float[Tensor, "height width 2"],
    tile: int,
    count: int,
) -> UInt8[Tensor, "references height width 3"]:
    """`count` images in the frame of a view, each a mosaic of patches of the photograph.

    In the k-th image, the content at the k-th anchor of each tile is where the view has it.
    """
    height, width, _ = photograph.shape
    rows, columns = torch.arange(height), torch.arange(width)
    # Anchors of a tile are spread by the quasi-random R2 sequence, which starts in the middle.
    steps = torch.arange(count)[:, None] * torch.tensor([0.7548777, 0.5698403])
    anchors = ((0.5 + steps) % 1 * tile).long()
    tops = (rows // tile * tile + anchors[:, :1]).clamp(max=height - 1)
    lefts = (columns // tile * tile + anchors[:, 1:]).clamp(max=width - 1)
    place = (places[tops[:, :, None], lefts[:, None, :]] - 0.5).round().long()
    # Content outside the photograph is replaced by its edge.
    moved_rows = (rows[:, None] + place[..., 1] - tops[:, :, None]).clamp(0, height - 1)
    moved_columns = (columns + place[..., 0] - lefts[:, None, :]).clamp(0, width - 1)
    return photograph[moved_rows, moved_columns]

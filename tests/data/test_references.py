import pytest
import torch

from cbnerf.config import Config
from cbnerf.data.references import (
    ReferencePatchSampler,
    find_content,
    find_references,
    move_tiles,
    reference_view,
)
from cbnerf.data.renders import Renders
from cbnerf.data.scene import Scene
from cbnerf.nerf.rays import Cameras, project
from cbnerf.overrides import with_overrides
from cbnerf.presets import METHODS, preset
from cbnerf.rng import Rng

CPU = torch.device("cpu")
CONFIG = with_overrides(
    preset("nerf-sr", "tiny"), {"refiner.references": 5, "refiner.patch_size": 16}
)


def test_content_at_a_depth_is_found_where_a_ray_meets_that_plane(tiny_cameras: Cameras):
    depth = 3.0  # along the average camera's axis
    t = torch.full((48, 64), 1 - 1 / depth, dtype=torch.float16)
    places = find_content(tiny_cameras, 3, t, 6)
    pose = tiny_cameras.camera_to_world[3]
    v, u = 20, 31
    focal = tiny_cameras.intrinsics[3, 0]
    direction = pose[:, :3] @ torch.tensor([(u + 0.5 - 32) / focal, (24 - v - 0.5) / focal, -1.0])
    point = pose[:, 3] + direction * (-depth - pose[2, 3]) / direction[2]
    expected = project(point, tiny_cameras, 6)
    torch.testing.assert_close(places[v, u], expected, atol=0.05, rtol=0)


def test_content_of_a_view_projects_into_itself_at_its_own_place(tiny_cameras: Cameras):
    depth = torch.rand(48, 64, generator=torch.Generator().manual_seed(0)).half()
    places = find_content(tiny_cameras, 2, depth, 2)
    v, u = torch.meshgrid(torch.arange(48) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    torch.testing.assert_close(places, torch.stack([u, v], dim=-1), atol=0.02, rtol=0)


def numbered(height: int = 20, width: int = 28) -> torch.Tensor:
    """A photograph whose pixels tell their row and column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, rows * 0], dim=-1).to(torch.uint8)


def places_of(photograph: torch.Tensor, down: int, right: int) -> torch.Tensor:
    rows, columns = photograph[..., 0].float(), photograph[..., 1].float()
    return torch.stack([columns + 0.5 + right, rows + 0.5 + down], dim=-1)


def test_tiles_move_with_their_content_to_the_edge_of_the_photograph():
    photograph = numbered()
    moved = move_tiles(photograph, places_of(photograph, 2, -3), tile=8, count=4)
    assert moved.shape == (4, 20, 28, 3)
    expected_rows = (photograph[..., 0].long() + 2).clamp(max=19)
    expected_columns = (photograph[..., 1].long() - 3).clamp(min=0)
    assert torch.equal(moved[..., 0].long(), expected_rows.expand(4, -1, -1))
    assert torch.equal(moved[..., 1].long(), expected_columns.expand(4, -1, -1))


def test_each_reference_follows_the_content_at_another_anchor():
    photograph = numbered(16, 32)
    places = places_of(photograph, 0, 0)
    places[:, 12:, 0] += 4  # the right half of the middle of the first tiles lies elsewhere
    moved = move_tiles(photograph, places, tile=16, count=6)
    shifts = {int(m[0, 0, 1]) for m in moved}
    assert shifts == {0, 4}


def test_a_scene_has_one_reference_view_and_other_methods_none(
    tiny_scene: Scene, tiny_renders: Renders
):
    assert reference_view(tiny_scene, CONFIG.data) == 1  # view 0 is a test view
    own = find_references(CONFIG, tiny_scene, tiny_renders, [1])
    assert own is not None and own.shape == (1, 5, 48, 64, 3)
    assert torch.equal(own[0], tiny_scene.images[1].expand(5, -1, -1, -1))
    assert find_references(Config(), tiny_scene, tiny_renders, [1]) is None
    assert find_references(METHODS["linear"], tiny_scene, tiny_renders, [1]) is None


def test_training_pairs_stay_pairs_and_references_are_unwarped(tiny_scene: Scene):
    photograph = tiny_scene.images[1]
    sampler = ReferencePatchSampler(255 - photograph, photograph, CONFIG, CPU)
    batch = sampler.draw(6, Rng(0, 0, CPU))
    assert batch.references.shape == (6, 5, 3, 16, 16)
    torch.testing.assert_close(batch.sr, 1 - batch.high_res, atol=1e-5, rtol=0)
    windows = photograph.movedim(-1, 0).unfold(1, 16, 1).unfold(2, 16, 1).movedim(0, 2)
    windows = windows.flatten(0, 1).float() / 255
    for patch in batch.references[:, 0]:
        assert (windows - patch).abs().amax(dim=(1, 2, 3)).min() < 1e-6


def test_patches_of_a_ramp_are_warped_ramps():
    """No black outside, no resampling error: values stay those of the ramp at the warped places."""
    ramp = (torch.arange(64) * 4).expand(48, 64)[..., None].expand(-1, -1, 3).to(torch.uint8)
    batch = ReferencePatchSampler(ramp, ramp, CONFIG, CPU).draw(32, Rng(1, 2, CPU))
    assert batch.high_res.diff(dim=3).min() >= -1e-6
    middles = batch.high_res[:, 0, :, 7:9].mean(2).diff(dim=1).abs().amax(1)
    assert (middles > 1e-4).any()  # some lean: they are warped


def test_a_patch_larger_than_the_images_is_refused(tiny_scene: Scene):
    small = tiny_scene.images[0, :12]
    with pytest.raises(ValueError, match="patch_size = 16 does not fit into 64x12"):
        ReferencePatchSampler(small, small, CONFIG, CPU)

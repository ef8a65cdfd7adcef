from pathlib import Path

import pytest
import torch

from cbnerf.config import Config
from cbnerf.data.scene import Scene
from cbnerf.nerf.rays import Cameras, make_rays, make_sub_pixel_rays
from cbnerf.overrides import with_overrides
from cbnerf.presets import METHODS, preset
from cbnerf.training.evaluation import render_views
from cbnerf.training.field import low_res_cameras, train_field
from cbnerf.training.models import load_field

CPU = torch.device("cpu")
FAST = {
    "field.optim.steps": 6, "field.optim.evaluations": 2, "field.optim.batch_size": 16,
    "field.num_coarse_samples": 8, "field.num_fine_samples": 6, "field.mlp.width": 16,
    "data.width": 64,
}  # fmt: skip
KINDS = {"planes": "cb-nerf", "mlp": "nerf-sr"}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make_config(kind: str, **changes) -> Config:
    return with_overrides(METHODS[KINDS[kind]], FAST | changes)


@pytest.fixture
def train(tiny_scene: Scene, keep):
    def run(config: Config, *, scene: Scene = tiny_scene, resume_from: Path | None = None):
        return train_field(config, scene, device=CPU, report=keep, resume_from=resume_from)

    return run


@pytest.mark.parametrize("method", METHODS)
def test_every_preset_trains_and_is_scored(method: str, train, keep):
    config = with_overrides(
        preset(method, "tiny"),
        {"field.optim.steps": 2, "field.optim.evaluations": 1, "field.num_coarse_samples": 8,
         "field.num_fine_samples": 4},
    )  # fmt: skip
    train(config)
    assert set(keep.metrics[2]) == {"train/loss", "train/psnr", "val/psnr", "val/ssim"}
    assert 5 < keep.metrics[2]["val/psnr"] < 25


@pytest.mark.parametrize("kind, rate", [("planes", 2e-2), ("mlp", 2e-3)])
def test_photographs_are_learned(kind: str, rate: float, train, keep):
    schedule = {"steps": 80, "evaluations": 4, "batch_size": 64, "lr": rate}
    longer = {f"field.optim.{knob}": value for knob, value in schedule.items()}
    train(make_config(kind, **longer, **{"data.validation": False, "field.mlp.width": 32}))
    psnr = [metrics["train/psnr"] for metrics in keep.metrics.values()]
    assert psnr[-1] > psnr[0] + 1.5


@every_kind
def test_a_resumed_run_ends_with_the_same_bits(kind: str, train, keep):
    config = make_config(kind)
    whole = train(config)
    whole_metrics = keep.metrics.pop(6)
    resumed = train(config, resume_from=keep.folder / "3.pt")
    assert keep.metrics[6] == whole_metrics
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@every_kind
def test_a_loaded_field_renders_the_same(kind: str, train, keep, tiny_cameras: Cameras):
    config = make_config(kind)
    model = train(config)
    loaded, cameras, stored = load_field(keep.folder / "6.pt", CPU)
    assert stored == config
    assert (cameras.size, cameras.frustum) == (tiny_cameras.size, tiny_cameras.frustum)
    assert torch.equal(cameras.intrinsics, tiny_cameras.intrinsics)
    torch.testing.assert_close(cameras.camera_to_world, tiny_cameras.camera_to_world)
    expected = render_views(model, tiny_cameras, [1], 2)
    assert torch.equal(render_views(loaded, cameras, [1], 2).rgb, expected.rgb)


def test_training_leaves_the_global_random_numbers_alone(train):
    def train_flat() -> torch.Tensor:
        model = train(make_config("planes", **{"data.validation": False}))
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    torch.manual_seed(1)
    first, number = train_flat(), torch.rand(())
    torch.manual_seed(2)
    assert torch.equal(train_flat(), first)
    torch.manual_seed(1)
    assert torch.rand(()) == number


def test_training_never_sees_held_out_photographs(train, keep, tiny_scene: Scene):
    losses = []
    for views in ([], [0, 4, 8], [1]):  # test and validation views are 0, 8 and 4
        images = tiny_scene.images.clone()
        images[views] = 0
        scene = Scene(**{**vars(tiny_scene), "images": images})
        train(make_config("planes"), scene=scene)
        losses.append([metrics["train/loss"] for metrics in keep.metrics.values()])
    assert losses[0] == losses[1] != losses[2]


def test_low_res_cameras_cast_the_same_rays(tiny_cameras: Cameras):
    low_res, view = low_res_cameras(tiny_cameras, 4), torch.tensor(3)
    here = make_rays(tiny_cameras, view, torch.tensor(20.0), torch.tensor(42.0))
    there = make_rays(low_res, view, torch.tensor(5.0), torch.tensor(10.5))
    torch.testing.assert_close(there.origins, here.origins)
    torch.testing.assert_close(there.directions, here.directions)


@pytest.mark.parametrize(
    "changes, size, rays",
    [
        ({"field.super_sampling": False}, (24, 32), 1),
        ({"field.sub_rays": 2}, (48, 64), 2),
        ({"field.sub_rays": 2, "field.opposite_sub_rays": False}, (48, 64), 2),
        ({"field.sub_rays": 0}, (48, 64), 4),
    ],
)
def test_a_pixel_is_one_ray_or_some_of_its_sub_pixels(changes, size, rays, train, monkeypatch):
    def look(cameras, views, rows, columns, scale, chosen):
        if len(chosen) != 16:  # those of the check for divergence
            return make_sub_pixel_rays(cameras, views, rows, columns, scale, chosen)
        assert (cameras.size, scale, chosen.shape) == (size, size[0] // 24, (16, rays))
        assert all(len(set(row)) == rays for row in chosen.tolist())
        opposite = changes.get("field.opposite_sub_rays", True)
        assert rays != 2 or opposite == bool((chosen.sum(1) == 3).all())
        raise InterruptedError

    monkeypatch.setattr("cbnerf.training.field.make_sub_pixel_rays", look)
    with pytest.raises(InterruptedError):
        train(make_config("planes", **changes))

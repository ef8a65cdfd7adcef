from pathlib import Path

import pytest
import torch

from cbnerf.config import METHODS, Config, preset, with_overrides
from cbnerf.data.renders import Renders
from cbnerf.data.scene import Scene
from cbnerf.training.evaluation import mean_scores, refine_views
from cbnerf.training.refiner import load_refiner, train_refiner

CPU = torch.device("cpu")
FAST = {
    "refiner.optim.steps": 6, "refiner.optim.evaluations": 2, "refiner.optim.batch_size": 2,
    "refiner.channels": 6, "refiner.blocks": 2, "refiner.patch_size": 16, "codebook.size": 32,
    "codebook.dim": 8, "data.width": 64,
}  # fmt: skip
METRICS = {"train/loss", "train/refine", "train/recon", "train/vq", "train/imitation",
           "codebook/perplexity", "codebook/used", "codebook/agreement", "val/psnr",
           "val/ssim", "val/gain"}  # fmt: skip
KINDS = {"residual": "cb-nerf", "paper": "cb-nerf-paper"}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make_config(kind: str, **changes) -> Config:
    return with_overrides(METHODS[KINDS[kind]], FAST | changes)


@pytest.fixture
def train(tiny_scene: Scene, tiny_renders: Renders, keep):
    def run(config: Config, resume_from: Path | None = None):
        return train_refiner(
            config, tiny_scene, tiny_renders, device=CPU, report=keep, resume_from=resume_from
        )

    return run


@pytest.mark.parametrize("method", METHODS)
def test_every_preset_trains_and_is_scored(method: str, train, keep):
    few = {"refiner.optim.steps": 2, "refiner.optim.evaluations": 1}
    train(with_overrides(preset(method, "tiny"), few))
    assert set(keep.metrics[2]) == METRICS


def lengthen(config: Config, **schedule) -> Config:
    return with_overrides(config, {f"refiner.optim.{k}": value for k, value in schedule.items()})


def test_the_loss_of_the_paper_refiner_falls(train, keep):
    train(lengthen(make_config("paper"), steps=30, evaluations=3, batch_size=4, lr=2e-3))
    losses = [metrics["train/loss"] for metrics in keep.metrics.values()]
    assert losses[-1] < 0.7 * losses[0]


def test_the_residual_refiner_sharpens_unseen_views(train, keep):
    train(lengthen(make_config("residual"), steps=80, evaluations=2, batch_size=4, lr=5e-3))
    assert keep.metrics[80]["val/gain"] > 0.5
    assert keep.metrics[80]["train/recon"] < keep.metrics[40]["train/recon"]


@every_kind
def test_a_resumed_run_ends_with_the_same_bits(kind: str, train, keep):
    config = make_config(kind)
    whole = train(config)
    whole_metrics = keep.metrics.pop(6)
    resumed = train(config, keep.folder / "3.pt")
    assert keep.metrics[6] == whole_metrics
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@every_kind
def test_a_loaded_refiner_refines_the_same(kind: str, train, keep, tiny_renders: Renders):
    refiner = train(make_config(kind))
    loaded = load_refiner(keep.folder / "6.pt", CPU)
    images = tiny_renders.rgb[:1]
    assert torch.equal(refine_views(loaded, images, CPU), refine_views(refiner, images, CPU))


def test_gain_is_the_change_against_stage_one(train, keep, tiny_scene, tiny_renders):
    train(make_config("residual"))
    before = mean_scores(tiny_renders.rgb[[4]], tiny_scene.images[[4]], "val")
    for metrics in keep.metrics.values():
        expected = metrics["val/psnr"] - before["val/psnr"]
        assert metrics["val/gain"] == pytest.approx(expected)


def test_training_never_sees_held_out_photographs(tiny_scene: Scene, tiny_renders: Renders, keep):
    losses = []
    for views in ([], [0, 4, 8], [1]):  # test and validation views are 0, 8 and 4
        images = tiny_scene.images.clone()
        images[views] = 0
        scene = Scene(**{**vars(tiny_scene), "images": images})
        train_refiner(make_config("residual"), scene, tiny_renders, device=CPU, report=keep)
        losses.append([metrics["train/loss"] for metrics in keep.metrics.values()])
    assert losses[0] == losses[1] != losses[2]


def test_without_validation_views_nothing_is_scored(train, keep):
    train(make_config("residual", **{"data.validation": False}))
    assert set(keep.metrics[6]) == {name for name in METRICS if not name.startswith("val/")}


def test_codebook_health_covers_the_whole_interval(train, keep):
    # One patch of 16 pixels has 16 codes: no single step can use more.
    train(make_config("residual", **{"refiner.optim.batch_size": 1}))
    for metrics in keep.metrics.values():
        assert 16 < metrics["codebook/perplexity"] <= 32 * metrics["codebook/used"]

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cbnerf.codebook.refiner import CodebookRefiner
from cbnerf.config import Config
from cbnerf.data.references import find_references
from cbnerf.data.renders import Renders
from cbnerf.data.scene import Scene, downsample
from cbnerf.downsampling import Kernel
from cbnerf.overrides import with_overrides
from cbnerf.presets import METHODS, preset
from cbnerf.training.evaluation import mean_scores, refine_views
from cbnerf.training.models import count_parameters, load_refiner
from cbnerf.training.refiner import Pairs, train_refiner

CPU = torch.device("cpu")
FAST = {
    "refiner.optim.steps": 6, "refiner.optim.evaluations": 2, "refiner.optim.batch_size": 2,
    "refiner.channels": 6, "refiner.blocks": 2, "refiner.patch_size": 16, "codebook.size": 32,
    "codebook.dim": 8, "data.width": 64,
}  # fmt: skip
METRICS = {"train/loss", "train/refine", "train/recon", "train/vq", "train/imitation",
           "codebook/perplexity", "codebook/used", "codebook/agreement", "val/psnr",
           "val/ssim", "val/gain"}  # fmt: skip
SCORES = {"train/loss", "val/psnr", "val/ssim", "val/gain"}
KINDS = {"residual": "cb-nerf", "paper": "cb-nerf-paper", "reference": "nerf-sr"}
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


@pytest.mark.parametrize("method", [method for method in METHODS if method != "nerf"])
def test_every_preset_trains_and_is_scored(method: str, train, keep):
    few = {"refiner.optim.steps": 2, "refiner.optim.evaluations": 1}
    train(with_overrides(preset(method, "tiny"), few))
    without_codes = ("nerf-sr", "linear", "cnn")
    assert set(keep.metrics[2]) == (SCORES if method in without_codes else METRICS)


def test_a_method_without_stage_two_has_nothing_to_train(train):
    with pytest.raises(ValueError, match="ends with stage 1"):
        train(preset("nerf", "tiny"))


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
def test_a_loaded_refiner_refines_the_same(kind: str, train, keep, tiny_scene, tiny_renders):
    refiner = train(make_config(kind))
    loaded = load_refiner(keep.folder / "6.pt", CPU)
    renders = tiny_renders.of([0])
    references = find_references(make_config(kind), tiny_scene, tiny_renders, [0])
    refined = refine_views(refiner, renders, CPU, references)
    assert torch.equal(refine_views(loaded, renders, CPU, references), refined)


def test_gain_is_the_change_against_stage_one(train, keep, tiny_scene, tiny_renders):
    train(make_config("residual"))
    before = mean_scores(tiny_renders.rgb[[4]], tiny_scene.images[[4]], "val")
    for metrics in keep.metrics.values():
        expected = metrics["val/psnr"] - before["val/psnr"]
        assert metrics["val/gain"] == pytest.approx(expected)


def blacken(scene: Scene, views: list[int]) -> Scene:
    images = scene.images.clone()
    images[views] = 0
    return replace(scene, images=images)


@pytest.mark.parametrize("method", [*KINDS.values(), "linear"])
def test_training_never_sees_held_out_photographs(
    method: str, tiny_scene: Scene, tiny_renders: Renders, keep
):
    losses = []
    for views in ([], [0, 4, 8], [1]):  # test and validation views are 0, 8 and 4
        scene = blacken(tiny_scene, views)
        config = with_overrides(METHODS[method], FAST)
        train_refiner(config, scene, tiny_renders, device=CPU, report=keep)
        losses.append([metrics["train/loss"] for metrics in keep.metrics.values()])
    assert losses[0] == losses[1] != losses[2]


def test_the_reference_refiner_sees_one_photograph(tiny_scene, tiny_renders, keep):
    losses = []
    for scene in (tiny_scene, blacken(tiny_scene, list(range(2, 10)))):
        train_refiner(make_config("reference"), scene, tiny_renders, device=CPU, report=keep)
        losses.append(keep.metrics[6]["train/loss"])
    assert losses[0] == losses[1]


def mirror_blocks(scene: Scene) -> Scene:
    """Other high-res photographs that become the same low-res ones."""
    blocks = scene.images.unflatten(2, (-1, scene.scale))
    return replace(scene, images=blocks.flip(3).flatten(2, 3))


@pytest.fixture
def sources(tiny_scene, tiny_renders) -> Pairs:
    wide = replace(tiny_scene, name="wide", images=tiny_scene.images.flip(2))
    smaller = replace(tiny_scene, name="smaller", images=tiny_scene.images[:, :40])
    cut = Renders(*(part[:, :40] for part in tiny_renders))
    return [(wide, tiny_renders), (smaller, cut)]


@pytest.mark.parametrize("method", ["cb-nerf", "linear"])
def test_an_unseen_scene_gives_low_res_photographs_of_training_views_alone(
    method: str, sources, tiny_scene, tiny_renders, keep
):
    def weights(scene: Scene, consistency: float, sources: Pairs = sources) -> dict[str, Tensor]:
        once = {"refiner.optim.steps": 2, "refiner.optim.evaluations": 1}
        knobs = FAST | once | {"refiner.consistency": consistency}
        config = with_overrides(METHODS[method], knobs)
        return train_refiner(
            config, scene, tiny_renders, device=CPU, report=keep, sources=sources
        ).state_dict()  # fmt: skip

    def are_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
        assert first.keys() == second.keys()
        return all(torch.equal(value, second[name]) for name, value in first.items())

    black = blacken(tiny_scene, list(range(10)))
    without = weights(tiny_scene, 0.0)
    assert are_equal(without, weights(black, 0.0))
    assert not are_equal(without, weights(tiny_scene, 0.0, sources=()))

    constrained = weights(tiny_scene, 10.0)
    assert not are_equal(constrained, without)
    assert are_equal(constrained, weights(mirror_blocks(tiny_scene), 10.0))
    assert are_equal(
        constrained, weights(blacken(tiny_scene, [0, 4, 8]), 10.0)
    )  # test and validation
    assert not are_equal(constrained, weights(blacken(tiny_scene, [1]), 10.0))


@pytest.mark.parametrize(
    "method, kernel",
    [("cb-nerf", "box"), ("linear", "box"), ("cb-nerf", "lanczos")],
)
def test_refined_views_of_an_unseen_scene_agree_with_its_low_res_photographs(
    method: str, kernel: Kernel, sources, tiny_scene, tiny_renders, keep
):
    views = [1, 2, 3, 5, 6, 7, 9]
    low_res = downsample(tiny_scene.images[views], tiny_scene.scale, kernel).float()
    errors = []
    for consistency in (0.0, 10.0):
        knobs = {"refiner.consistency": consistency, "data.low_res_kernel": kernel}
        config = with_overrides(METHODS[method], FAST | knobs)
        refiner = train_refiner(
            config, tiny_scene, tiny_renders, device=CPU, report=keep, sources=sources
        )
        refined = refine_views(refiner, tiny_renders.of(views), CPU)
        shrunk = downsample(refined, tiny_scene.scale, kernel).float()
        errors.append(float((shrunk - low_res).square().mean()))
    assert errors[1] < 0.9 * errors[0]


def test_scenes_that_share_a_refiner_teach_it_and_are_scored_together(
    tiny_scene, tiny_renders, keep
):
    config = make_config("residual", **{"codebook.shared": True})
    smaller = replace(tiny_scene, name="smaller", images=tiny_scene.images[:, :40].flip(2))
    cut = Renders(*(part[:, :40].flip(2) for part in tiny_renders))
    weights = []
    for views in ([], [0, 4, 8], [1]):  # test and validation views are 0, 8 and 4
        joint = [(blacken(smaller, views), cut)]
        refiner = train_refiner(
            config, tiny_scene, tiny_renders, device=CPU, report=keep, joint=joint
        )
        weights.append(refiner.state_dict()["filters.table"])
        pairs = [(tiny_scene, tiny_renders), *joint]
        scores = [
            mean_scores(refine_views(refiner, r.of([4]), CPU), s.images[[4]], "val")
            for s, r in pairs
        ]
        before = [mean_scores(r.rgb[[4]], s.images[[4]], "val") for s, r in pairs]
        mean, base = (sum(s["val/psnr"] for s in part) / 2 for part in (scores, before))
        assert keep.metrics[6]["val/psnr"] == pytest.approx(mean)
        assert keep.metrics[6]["val/gain"] == pytest.approx(mean - base)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_reference_must_be_of_the_scene_itself(tiny_scene, tiny_renders, keep):
    with pytest.raises(ValueError, match="needs a high-res photograph of its scene"):
        train_refiner(
            make_config("reference"), tiny_scene, tiny_renders,
            device=CPU, report=keep, sources=[(tiny_scene, tiny_renders)],
        )  # fmt: skip


def test_the_linear_refiner_is_the_best_of_its_kind_at_once(train, keep, tiny_renders):
    train(with_overrides(METHODS["linear"], FAST))
    assert list(keep.metrics) == [6]
    assert keep.metrics[6]["val/gain"] > 0.1


def test_without_validation_views_nothing_is_scored(train, keep):
    train(make_config("residual", **{"data.validation": False}))
    assert set(keep.metrics[6]) == {name for name in METRICS if not name.startswith("val/")}


def test_codebook_health_covers_the_whole_interval(train, keep):
    # The patch of a step shows a part of the scene, and codes of other parts are not used.
    by_step = []
    for evaluations in (6, 1):
        changes = {"refiner.optim.batch_size": 1, "refiner.optim.evaluations": evaluations}
        train(make_config("residual", **changes))
        by_step.append([metrics["codebook/used"] for metrics in keep.metrics.values()])
        for metrics in keep.metrics.values():
            assert 1 < metrics["codebook/perplexity"] <= 32 * metrics["codebook/used"]
        keep.metrics.clear()
    single, (whole,) = by_step
    assert len(single) == 6 and whole > max(single)


def test_reported_refiners_have_the_filters_of_the_start(train, keep):
    refiner = train(make_config("residual"))
    solved = refiner.state_dict()["filters.table"]
    assert solved.abs().max() > 1e-3
    for step in (3, 6):
        state = torch.load(keep.folder / f"{step}.pt", weights_only=True)["model"]
        assert torch.equal(state["filters.table"], solved)


@pytest.mark.parametrize("kind, turned", [("residual", False), ("paper", True)])
def test_patches_with_positions_are_not_turned(kind: str, turned: bool, train, monkeypatch):
    """To the right, x grows; downwards, y falls."""
    grows: list[bool] = []
    losses = CodebookRefiner.losses

    def look(refiner: CodebookRefiner, forward, sr: Tensor, *rest: Tensor) -> dict[str, Tensor]:
        x, y = sr[:, 3].mean(1), sr[:, 4].mean(2)
        grows.extend(((x[:, -1] > x[:, 0]) & (y[:, -1] < y[:, 0])).tolist())
        return losses(refiner, forward, sr, *rest)

    monkeypatch.setattr(CodebookRefiner, "losses", look)
    train(make_config(kind))
    assert len(grows) == 12 and all(grows) != turned


@pytest.mark.parametrize("consistency, steps", [(0.0, [3, 6]), (10.0, [6])])
def test_an_unseen_scene_with_low_res_photographs_is_solved_and_not_trained(
    consistency: float, steps: list[int], sources, tiny_scene, tiny_renders, keep
):
    config = make_config("residual", **{"refiner.consistency": consistency})
    is_solved = consistency > 0
    refiner, other = (
        train_refiner(config, tiny_scene, tiny_renders, device=CPU, report=keep, sources=some)
        for some in (sources, sources[:1])
    )
    assert list(keep.metrics) == steps
    assert (refiner.get_parameter("network.tail.0.weight").abs().max() == 0) == is_solved
    if is_solved:
        assert set(keep.metrics[6]) == {"val/psnr", "val/ssim", "val/gain"}
    # Codes are then those of its own renders, whatever the sources.
    codes = [r.state_dict()["autoencoder.quantizer.codebook"] for r in (refiner, other)]
    assert torch.equal(*codes) == is_solved


def test_codes_and_filters_count_as_parameters():
    small, large = (
        count_parameters(with_overrides(METHODS["cb-nerf"], {"codebook.size": size}))
        for size in (64, 1024)
    )
    assert large - small == (1024 - 64) * (32 + 3 + (3 * 7 * 7 + 1) * 3)

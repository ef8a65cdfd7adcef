import itertools

import pytest
import torch
from refiners import draw_image, draw_pair, make_refiner, wake

from cbnerf.baselines.cnn import CNNRefiner
from cbnerf.baselines.linear import LinearRefiner
from cbnerf.baselines.nerf_sr import ReferenceRefiner
from cbnerf.baselines.paper import PaperRefiner
from cbnerf.codebook.refiner import Refinement, refiner_losses
from cbnerf.codebook.residual import ResidualRefiner
from cbnerf.config import LossConfig
from cbnerf.overrides import with_overrides
from cbnerf.presets import METHODS, RESOLUTIONS, preset
from cbnerf.training.models import build_refiner

both = pytest.mark.parametrize("method", ["cb-nerf", "cb-nerf-paper"])


@pytest.mark.parametrize("codes, parameters", [(512, 1_638_790), (1024, 1_671_558)])
def test_paper_refiner_has_the_published_number_of_parameters(codes: int, parameters: int):
    refiner = build_refiner(with_overrides(METHODS["cb-nerf-paper"], {"codebook.size": codes}))
    assert sum(parameter.numel() for parameter in refiner.parameters()) == parameters


COMBINATIONS = [
    {"refiner__skips": skips, "codebook__imitation": imitation} | healthy
    for skips, imitation, healthy in itertools.product(
        ["hr", "sr", "mixed"],
        ["vq", "feature", "ce"],
        [
            {f"codebook__{knob}": value for knob in ("ema", "normalize")}
            | {"codebook__revive_below": 0.05 * value}
            for value in (False, True)
        ],
    )
]


@both
def test_every_parameter_gets_a_gradient_in_every_step(method: str):
    sr, high_res = draw_pair(batch=1, size=8)  # one patch: `mixed` decodes no SR codes at all
    weights = LossConfig(lambda_refine=0.0, lambda_recon=0.0, lambda_vq=0.0, lambda_imitation=0.0)
    without_skips = [knobs for knobs in COMBINATIONS if knobs["refiner__skips"] == "hr"]
    for overrides in without_skips if method == "cb-nerf" else COMBINATIONS[::3]:
        refiner = make_refiner(method, **overrides)
        for _ in range(2):
            refiner.zero_grad()
            refiner_losses(refiner(sr, high_res), high_res, weights).loss.backward()
            without = [
                n for n, p in refiner.named_parameters() if p.requires_grad and p.grad is None
            ]
            assert not without, (overrides, without)


def test_skips_decide_whether_training_sees_the_photograph():
    method = "cb-nerf-paper"
    sr, high_res = draw_pair()
    for skips, leaking_rows in (("hr", [0, 1, 2, 3]), ("sr", []), ("mixed", [0, 2])):
        refiner = make_refiner(method, refiner__skips=skips)
        wake(refiner).eval()  # the codebook stands still
        changed = refiner(sr, high_res).refined - refiner(sr, 1 - high_res).refined
        rows = changed.detach().abs().flatten(1).max(1).values > 1e-6
        assert rows.nonzero().flatten().tolist() == leaking_rows, skips


@both
def test_whole_image_equals_its_crop_away_from_borders(method: str):
    refiner = wake(make_refiner(method))
    image = draw_image(121, 94)
    whole, crop = refiner.refine(image), refiner.refine(image[..., 8:, 4:])
    assert whole.shape == (1, 3, 121, 94)
    inside = (..., slice(48, 72), slice(44, 50))
    torch.testing.assert_close(whole[..., 8:, 4:][inside], crop[inside], atol=1e-5, rtol=0)
    assert whole[inside].std() > 0


@pytest.mark.parametrize("tile", [16, 23, 60, 100])
@both
def test_tiles_give_the_whole_image_up_to_its_borders(method: str, tile: int):
    refiner = wake(make_refiner(method, refiner__blocks=2))
    image = draw_image(125, 94)
    whole, tiled = refiner.refine(image), refiner.refine(image, tile=tile)
    torch.testing.assert_close(tiled, whole, atol=1e-4, rtol=0)
    assert whole.std() > 0.01


@both
def test_a_pixel_reaches_as_far_as_the_halo_says(method: str):
    refiner = wake(make_refiner(method, refiner__blocks=2))
    image = draw_image(8, 200)
    changed = image.clone()
    changed[..., 100:] = 1 - changed[..., 100:]
    difference = (refiner.refine(changed) - refiner.refine(image)).abs().amax((0, 1, 2))
    first = int((difference > 1e-7).nonzero()[0])
    # All of the halo is needed, except for what numbers are too small to show.
    assert 100 - refiner.halo <= first <= 100 - refiner.halo // 2


def test_a_tile_must_hold_a_code():
    with pytest.raises(ValueError, match="tile = 3 must be at least 4"):
        make_refiner().refine(draw_image(8, 8), tile=3)


@pytest.mark.parametrize("height, width", [(1, 1), (5, 7), (16, 9)])
@both
def test_images_of_any_size_stay_in_range(method: str, height: int, width: int):
    refiner = wake(make_refiner(method))
    refined = refiner.refine(torch.rand(2, 6, height, width))
    assert refined.shape == (2, 3, height, width)
    assert not refined.requires_grad
    assert 0 <= refined.min() and refined.max() <= 1


@pytest.mark.parametrize(
    "method, weight, heeds",
    [("cb-nerf", 2.0, True), ("cb-nerf", 0.0, False), ("cb-nerf-paper", 0.0, False)],
)  # fmt: skip
def test_positions_matter_to_codes_that_hold_them(method: str, weight: float, heeds: bool):
    refiner = wake(make_refiner(method, codebook__position_weight=weight))
    sr, _ = draw_pair()
    refined = refiner.refine(sr)
    elsewhere = torch.cat([sr[:, :3], sr[:, 3:].flip(0)], dim=1)
    assert torch.equal(refiner.refine(elsewhere), refined) != heeds
    if weight == 0:
        assert torch.equal(refiner.refine(sr[:, :3]), refined)


@both
def test_refining_is_the_training_pass_with_sr_skips(method: str):
    refiner = wake(make_refiner(method, refiner__skips="sr")).eval()
    sr, high_res = draw_pair()
    refined = refiner(sr, high_res).refined
    torch.testing.assert_close(refiner.refine(sr), refined.clamp(0, 1).detach())


def make_refinement(refined: torch.Tensor, reconstruction: torch.Tensor) -> Refinement:
    return Refinement(
        refined=refined,
        reconstruction=reconstruction,
        vq_loss=torch.tensor(3.0),
        imitation_loss=torch.tensor(5.0),
        high_res_indices=torch.zeros(1, 1, 1, dtype=torch.int64),
        sr_indices=torch.zeros(1, 1, 1, dtype=torch.int64),
    )


def test_losses_by_hand():
    high_res = torch.full((1, 3, 4, 4), 0.5)
    refinement = make_refinement(high_res + 0.1, high_res - 0.2)
    weights = LossConfig(lambda_refine=2.0, lambda_recon=10.0, lambda_vq=0.5, lambda_imitation=0.1)
    losses = refiner_losses(refinement, high_res, weights)
    # In [-1, 1]: |0.2| and 0.4^2.
    assert losses.refine.item() == pytest.approx(0.2, rel=1e-5)
    assert losses.recon.item() == pytest.approx(0.16, rel=1e-5)
    assert (losses.vq.item(), losses.imitation.item()) == (3, 5)
    assert losses.loss.item() == pytest.approx(2 * 0.2 + 10 * 0.16 + 0.5 * 3 + 0.1 * 5, rel=1e-5)


@pytest.mark.parametrize("margin", [0, 1, 3])
def test_the_refine_loss_alone_leaves_out_the_margin(margin: int):
    high_res = torch.full((1, 3, 8, 8), 0.5)
    wrong = high_res + 0.1
    inside = slice(margin, 8 - margin)
    wrong[..., inside, inside] -= 0.1
    refinement = make_refinement(wrong, wrong)
    whole, inner = (refiner_losses(refinement, high_res, LossConfig(), m) for m in (0, margin))
    assert inner.refine.item() == pytest.approx(0, abs=1e-6)
    assert inner.recon.item() == whole.recon.item()
    # One pixel less is too little.
    if margin:
        assert refiner_losses(refinement, high_res, LossConfig(), margin - 1).refine > 0.01


@pytest.mark.parametrize("method, margin", [("cb-nerf", 3), ("cb-nerf-paper", 0)])
def test_patches_train_without_the_margin_of_their_refiner(method: str, margin: int):
    refiner = wake(make_refiner(method, refiner__skips="sr")).eval()
    sr, high_res = draw_pair()
    refined, inside = refiner(sr, high_res).refined, slice(margin, 16 - margin)
    error = 2 * (refined - high_res)[..., inside, inside].abs().mean().item()
    loss = refiner.losses(refiner, sr, high_res)["train/refine"].item()
    assert loss == pytest.approx(error, rel=1e-5)


@both
def test_a_photograph_is_reconstructed_from_its_codes_alone(method: str):
    refiner = wake(make_refiner(method)).eval()
    sr, high_res = draw_pair()
    told = refiner(sr, high_res).reconstruction.clamp(0, 1).detach()
    torch.testing.assert_close(refiner.autoencoder.reconstruct(sr, high_res), told)
    cut = (..., slice(13), slice(15))
    assert refiner.autoencoder.reconstruct(sr[cut], high_res[cut]).shape == (4, 3, 13, 15)
    # The render lends its positions, not its colours.
    other = torch.cat([1 - sr[:, :3], sr[:, 3:]], dim=1)
    torch.testing.assert_close(refiner.autoencoder.reconstruct(other, high_res), told)


def test_metrics_tell_the_health_of_the_codebook_since_the_last_call():
    refiner = make_refiner()
    assert refiner.metrics() == {}
    refiner.losses(refiner, *draw_pair())
    assert {"codebook/perplexity", "codebook/used", "codebook/agreement"} == set(refiner.metrics())
    assert refiner.metrics() == {}


REFINERS = {
    "cb-nerf": ResidualRefiner, "cnn": CNNRefiner, "cb-nerf-paper": PaperRefiner,
    "nerf-sr": ReferenceRefiner, "linear": LinearRefiner,
}  # fmt: skip


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_presets_build_their_refiner(resolution: str):
    for method, kind in REFINERS.items():
        assert type(build_refiner(preset(method, resolution))) is kind
    assert {*REFINERS, "nerf"} == set(METHODS)
    with pytest.raises(ValueError, match="ends with stage 1"):
        build_refiner(preset("nerf", resolution))

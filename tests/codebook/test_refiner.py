import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

from cbnerf.baselines.linear import LinearRefiner
from cbnerf.baselines.nerf_sr import ReferenceRefiner
from cbnerf.baselines.paper import PaperRefiner
from cbnerf.codebook.refiner import CodebookRefiner, Refinement, refiner_losses
from cbnerf.codebook.residual import ResidualRefiner
from cbnerf.codebook.views import Views
from cbnerf.config import LossConfig
from cbnerf.downsampling import REACH, Kernel, downsample
from cbnerf.overrides import with_overrides
from cbnerf.presets import METHODS, RESOLUTIONS, preset
from cbnerf.training.models import build_refiner

SMALL = {"refiner.channels": 6, "refiner.blocks": 2, "codebook.size": 16, "codebook.dim": 4}


def make_refiner(method: str = "cb-nerf", **overrides) -> CodebookRefiner:
    torch.manual_seed(0)
    changes = SMALL | {name.replace("__", "."): value for name, value in overrides.items()}
    refiner = build_refiner(with_overrides(METHODS[method], changes))
    assert isinstance(refiner, CodebookRefiner)
    return refiner


def wake(refiner: CodebookRefiner) -> CodebookRefiner:
    """Fill what is initialised with zeros, as training would."""
    with torch.no_grad():
        for parameter in refiner.parameters():
            if parameter.count_nonzero() == 0:
                parameter.copy_(0.3 * torch.randn_like(parameter))
        if isinstance(refiner, ResidualRefiner):
            refiner.filters.table.normal_(std=0.02)
    return refiner


def draw_pair(batch: int = 4, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    high_res = torch.rand(batch, 3, size, size, generator=generator)
    return F.interpolate(F.avg_pool2d(high_res, 2), scale_factor=2), high_res


@pytest.mark.parametrize("codes, parameters", [(512, 1_638_790), (1024, 1_671_558)])
def test_paper_refiner_has_the_published_number_of_parameters(codes: int, parameters: int):
    refiner = build_refiner(with_overrides(METHODS["cb-nerf-paper"], {"codebook.size": codes}))
    assert sum(parameter.numel() for parameter in refiner.parameters()) == parameters


@pytest.mark.parametrize("method", ["cb-nerf", "residual-cnn"])
def test_residual_refiner_starts_as_the_identity(method: str):
    refiner = make_refiner(method)
    sr, high_res = draw_pair()
    torch.testing.assert_close(refiner(sr, high_res).refined, sr)
    torch.testing.assert_close(refiner.refine(sr), sr)


@pytest.mark.parametrize("method", ["cb-nerf", "residual-cnn"])
def test_a_filter_of_the_render_is_added_whatever_the_code(method: str):
    refiner = make_refiner(method)
    assert isinstance(refiner, ResidualRefiner)
    refiner.filters.table.normal_(std=1e-3)
    sr = 0.4 + 0.2 * draw_pair()[0]
    added = LinearRefiner(METHODS["linear"])
    for parameter in added.parameters():
        torch.nn.init.normal_(parameter, std=1e-3)
    assert added.filter.bias is not None
    weights = torch.cat([added.filter.weight.flatten(1).T, added.filter.bias[None]]).detach()
    before = refiner.refine(sr)
    refiner.add_filter(weights)
    torch.testing.assert_close(refiner.refine(sr), before + added.filter(sr).detach())


def test_first_steps_open_the_tail():
    refiner = make_refiner()
    optimizer = torch.optim.Adam(refiner.parameters(), lr=1e-2)
    sr, high_res = draw_pair()
    for _ in range(3):
        optimizer.zero_grad()
        refiner_losses(refiner(sr, high_res), high_res, LossConfig()).loss.backward()
        optimizer.step()
    assert refiner.get_parameter("tail.0.weight").abs().min() > 0


COMBINATIONS = [
    {"refiner__codes": codes, "refiner__skips": skips, "codebook__imitation": imitation} | healthy
    for codes, skips, imitation, healthy in itertools.product(
        [True, False],
        ["hr", "sr", "mixed"],
        ["vq", "feature", "ce"],
        [
            {f"codebook__{knob}": value for knob in ("ema", "normalize")}
            | {"codebook__revive_below": 0.05 * value}
            for value in (False, True)
        ],
    )
]


@pytest.mark.parametrize("method", ["cb-nerf", "cb-nerf-paper"])
def test_every_parameter_gets_a_gradient_in_every_step(method: str):
    sr, high_res = draw_pair(batch=1, size=8)  # one patch: `mixed` decodes no SR codes at all
    weights = LossConfig(lambda_refine=0.0, lambda_recon=0.0, lambda_vq=0.0, lambda_imitation=0.0)
    without_skips = [knobs for knobs in COMBINATIONS if knobs["refiner__skips"] == "hr"]
    for overrides in without_skips if method == "cb-nerf" else COMBINATIONS[::5]:
        refiner = make_refiner(method, **overrides)
        for _ in range(2):
            refiner.zero_grad()
            refiner_losses(refiner(sr, high_res), high_res, weights).loss.backward()
            without = [
                n for n, p in refiner.named_parameters() if p.requires_grad and p.grad is None
            ]
            assert not without, (overrides, without)


def test_the_control_is_the_same_network_with_one_filter():
    refiner, control = make_refiner("cb-nerf"), make_refiner("residual-cnn")
    shapes = [{n: tuple(p.shape) for n, p in r.named_parameters()} for r in (refiner, control)]
    codes = refiner.autoencoder.quantizer.num_codes
    assert [shape.pop("filters.table") for shape in shapes] == [(codes, 148, 3), (1, 148, 3)]
    assert shapes[0] == shapes[1]
    sr, _ = draw_pair()
    for network, ignores in ((refiner, False), (control, True)):
        before = wake(network).refine(sr)
        network.autoencoder.quantizer.codebook.mul_(-1)
        assert torch.equal(network.refine(sr), before) == ignores


def test_neighbours_join_the_nearest_code():
    sr, _ = draw_pair()
    table = torch.randn(16, 148, 3, generator=torch.Generator().manual_seed(2)) * 0.02
    refined = []
    for neighbours in (1, 3, 15, 99):
        refiner = make_refiner(refiner__neighbours=neighbours)
        refiner.filters.table.copy_(table)
        refined.append(refiner.refine(sr))
    one, three, most, more = refined
    assert not torch.equal(one, three) and not torch.equal(three, most)
    assert torch.equal(most, more)  # there are 16 codes


def test_control_gets_the_same_gradients():
    sr, high_res = draw_pair()
    gradients: list[dict[str, torch.Tensor]] = []
    for method in ("cb-nerf", "residual-cnn"):
        refiner = make_refiner(method)
        refiner_losses(refiner(sr, high_res), high_res, LossConfig()).loss.backward()
        refiner.eval().fit(Views(sr.split(1), high_res.split(1), [0, 1, 0, 0], [1]))
        gradients.append({n: p.grad for n, p in refiner.named_parameters() if p.grad is not None})
        assert refiner.filters.table.abs().max() > 1e-3
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_skips_decide_whether_training_sees_the_photograph():
    method = "cb-nerf-paper"
    sr, high_res = draw_pair()
    for skips, leaking_rows in (("hr", [0, 1, 2, 3]), ("sr", []), ("mixed", [0, 2])):
        refiner = make_refiner(method, refiner__skips=skips)
        wake(refiner).eval()  # the codebook stands still
        changed = refiner(sr, high_res).refined - refiner(sr, 1 - high_res).refined
        rows = changed.detach().abs().flatten(1).max(1).values > 1e-6
        assert rows.nonzero().flatten().tolist() == leaking_rows, skips


@pytest.mark.parametrize("method", ["cb-nerf", "cb-nerf-paper"])
def test_whole_image_equals_its_crop_away_from_borders(method: str):
    refiner = wake(make_refiner(method))
    image = 0.25 + 0.5 * torch.rand(1, 3, 121, 94, generator=torch.Generator().manual_seed(2))
    whole, crop = refiner.refine(image), refiner.refine(image[..., 8:, 4:])
    assert whole.shape == image.shape
    inside = (..., slice(48, 72), slice(44, 50))
    torch.testing.assert_close(whole[..., 8:, 4:][inside], crop[inside], atol=1e-5, rtol=0)
    assert whole[inside].std() > 0


@pytest.mark.parametrize("tile", [16, 23, 60, 100])
@pytest.mark.parametrize("method", ["cb-nerf", "cb-nerf-paper"])
def test_tiles_give_the_whole_image_up_to_its_borders(method: str, tile: int):
    refiner = wake(make_refiner(method, refiner__blocks=2))
    image = 0.25 + 0.5 * torch.rand(1, 3, 125, 94, generator=torch.Generator().manual_seed(2))
    whole, tiled = refiner.refine(image), refiner.refine(image, tile=tile)
    torch.testing.assert_close(tiled, whole, atol=1e-4, rtol=0)
    assert whole.std() > 0.01


@pytest.mark.parametrize("method", ["cb-nerf", "cb-nerf-paper"])
def test_a_pixel_reaches_as_far_as_the_halo_says(method: str):
    refiner = wake(make_refiner(method, refiner__blocks=2))
    image = 0.25 + 0.5 * torch.rand(1, 3, 8, 200, generator=torch.Generator().manual_seed(2))
    changed = image.clone()
    changed[..., 100:] = 1 - changed[..., 100:]
    difference = (refiner.refine(changed) - refiner.refine(image)).abs().amax((0, 1, 2))
    first = int((difference > 1e-7).nonzero()[0])
    # All of the halo is needed, except for what numbers are too small to show.
    assert 100 - refiner.halo <= first <= 100 - refiner.halo // 2


def test_a_tile_must_hold_a_code():
    with pytest.raises(ValueError, match="tile = 3 must be at least 4"):
        make_refiner().refine(torch.rand(1, 3, 8, 8), tile=3)


@pytest.mark.parametrize("height, width", [(1, 1), (5, 7), (16, 9)])
def test_images_of_any_size_stay_in_range(height: int, width: int):
    refiner = make_refiner("cb-nerf-paper")
    refined = refiner.refine(torch.rand(2, 3, height, width))
    assert refined.shape == (2, 3, height, width)
    assert not refined.requires_grad
    assert 0 <= refined.min() and refined.max() <= 1


def test_refining_is_the_training_pass_with_sr_skips():
    refiner = wake(make_refiner("cb-nerf-paper", refiner__skips="sr")).eval()
    sr, high_res = draw_pair()
    refined = refiner(sr, high_res).refined
    torch.testing.assert_close(refiner.refine(sr), refined.clamp(0, 1).detach())


def test_codes_of_the_residual_refiner_ignore_constant_colour():
    refiner = make_refiner().eval()
    sr, high_res = draw_pair()
    plain, brighter = refiner(sr, high_res), refiner(sr, high_res + 0.3)
    assert torch.equal(plain.high_res_indices, brighter.high_res_indices)
    torch.testing.assert_close(brighter.reconstruction, plain.reconstruction + 0.3)


def test_losses_by_hand():
    high_res = torch.full((1, 3, 4, 4), 0.5)
    refinement = Refinement(
        refined=high_res + 0.1,
        reconstruction=high_res - 0.2,
        vq_loss=torch.tensor(3.0),
        imitation_loss=torch.tensor(5.0),
        high_res_indices=torch.zeros(1, 1, 1, dtype=torch.int64),
        sr_indices=torch.zeros(1, 1, 1, dtype=torch.int64),
    )
    weights = LossConfig(lambda_refine=2.0, lambda_recon=10.0, lambda_vq=0.5, lambda_imitation=0.1)
    losses = refiner_losses(refinement, high_res, weights)
    # In [-1, 1]: |0.2| and 0.4^2.
    assert losses.refine.item() == pytest.approx(0.2, rel=1e-5)
    assert losses.recon.item() == pytest.approx(0.16, rel=1e-5)
    assert (losses.vq.item(), losses.imitation.item()) == (3, 5)
    assert losses.loss.item() == pytest.approx(2 * 0.2 + 10 * 0.16 + 0.5 * 3 + 0.1 * 5, rel=1e-5)


def draw_texture(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Renders with stripes, every second one on a chequerboard, and photographs in which stripes
    are sharper on the chequerboard and softer without."""
    stripes = 0.1 * torch.rand(count, 3, 1, 32).expand(-1, -1, 32, -1)
    detail = stripes - F.avg_pool2d(F.pad(stripes, (1,) * 4, mode="replicate"), 3, 1)
    board = 0.2 * ((torch.arange(32)[:, None] + torch.arange(32)) % 2)
    is_board = (torch.arange(count) % 2 == 1)[:, None, None, None]
    render = 0.4 + stripes + torch.where(is_board, board, 0)
    return render, render + torch.where(is_board, 0.5, -0.5) * detail


def test_codes_correct_each_kind_of_place_in_its_own_way():
    """What is right for one kind of place is wrong for the other: no common filter can do both."""
    torch.manual_seed(0)
    renders, photographs = draw_texture(16)
    unseen, wanted = draw_texture(16)
    left = {}
    for method in ("cb-nerf", "residual-cnn"):
        refiner = make_refiner(method, codebook__dim=16)
        refiner.start_from(photographs.split(1))
        folds = [i // 12 for i in range(16)]
        refiner.eval().fit(Views(renders.split(1), photographs.split(1), folds, [1]))
        errors = (refiner.refine(unseen) - wanted, unseen - wanted)
        after, before = (error[..., 4:-4, 4:-4].square().mean().item() for error in errors)
        left[method] = after / before
    assert left["residual-cnn"] > 0.9
    assert left["cb-nerf"] < 0.1


def test_a_photograph_is_reconstructed_from_its_codes_alone():
    for method in ("cb-nerf", "cb-nerf-paper"):
        refiner = wake(make_refiner(method)).eval()
        sr, high_res = draw_pair()
        told = refiner(sr, high_res).reconstruction.clamp(0, 1).detach()
        torch.testing.assert_close(refiner.autoencoder.reconstruct(high_res), told)
        assert refiner.autoencoder.reconstruct(high_res[..., :13, :15]).shape == (4, 3, 13, 15)


REFINERS = {
    "cb-nerf": ResidualRefiner, "residual-cnn": ResidualRefiner, "cb-nerf-paper": PaperRefiner,
    "nerf-sr": ReferenceRefiner, "linear": LinearRefiner,
}  # fmt: skip


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_presets_build_their_refiner(resolution: str):
    for method, kind in REFINERS.items():
        assert type(build_refiner(preset(method, resolution))) is kind
    assert {*REFINERS, "nerf"} == set(METHODS)
    with pytest.raises(ValueError, match="ends with stage 1"):
        build_refiner(preset("nerf", resolution))


@pytest.mark.parametrize("kernel", REACH)
def test_codes_learn_from_low_res_photographs(kernel: Kernel):
    """What differs from code to code is found in low-res pixels, and serves another view."""
    refiner = make_refiner(codebook__size=4, refiner__neighbours=1, data__low_res_kernel=kernel)
    assert isinstance(refiner, ResidualRefiner)
    renders = 0.35 + 0.3 * torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    truth = copy.deepcopy(refiner)
    truth.filters.table[:, -1] = 0.1 * torch.randn(len(truth.filters.table), 3)
    wanted = truth.refine(renders)
    folds = [int(view % 4 == 1) for view in range(7)]
    low_res = downsample(wanted[1:], 2, kernel)
    refiner._back_project(Views(renders[1:].split(1), low_res.split(1), folds, [1]))
    before = (renders[0] - wanted[0]).square().mean()
    assert (refiner.refine(renders[:1])[0] - wanted[0]).square().mean() < 0.3 * before

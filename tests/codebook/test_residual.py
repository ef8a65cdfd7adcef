import copy

import pytest
import torch
import torch.nn.functional as F
from refiners import draw_pair, make_refiner, make_residual, place, wake

from cbnerf.baselines.linear import LinearRefiner
from cbnerf.codebook.refiner import Refiner, refiner_losses
from cbnerf.codebook.residual import ResidualRefiner
from cbnerf.codebook.views import Views
from cbnerf.config import LossConfig
from cbnerf.downsampling import REACH, Kernel, downsample
from cbnerf.presets import METHODS

REFINE_ALONE = LossConfig(lambda_recon=0.0, lambda_vq=0.0, lambda_imitation=0.0)


def views_of(renders: torch.Tensor, photographs: torch.Tensor) -> Views:
    return Views(renders.split(1), photographs.split(1))


def test_residual_refiner_starts_as_the_identity():
    refiner = make_refiner()
    sr, high_res = draw_pair()
    torch.testing.assert_close(refiner(sr, high_res).refined, sr[:, :3])
    torch.testing.assert_close(refiner.refine(sr), sr[:, :3])


def test_a_filter_of_the_render_is_added_whatever_the_code():
    refiner = make_residual()
    refiner.filters.table.normal_(std=1e-3)
    sr, _ = draw_pair()
    sr[:, :3] = 0.4 + 0.2 * sr[:, :3]
    added = LinearRefiner(METHODS["linear"])
    for parameter in added.parameters():
        torch.nn.init.normal_(parameter, std=1e-3)
    assert added.filter.bias is not None
    weights = torch.cat(
        [added.filter.weight.movedim(1, -1).flatten(1).T, added.filter.bias[None]]
    ).detach()
    before = refiner.refine(sr)
    refiner.add_filter(weights)
    torch.testing.assert_close(refiner.refine(sr), before + added.filter(sr[:, :3]).detach())


def test_the_network_corrects_the_filtered_image_and_sees_the_render_too():
    refiner = make_residual()
    torch.nn.init.normal_(refiner.get_parameter("network.tail.0.weight"), std=0.05)
    sr, _ = draw_pair()
    sr[:, :3] = 0.4 + 0.2 * sr[:, :3]

    def network(render: torch.Tensor, filtered: torch.Tensor) -> torch.Tensor:
        both = torch.cat([render, filtered], dim=1) * 2 - 1
        return refiner.network(both).detach() / 2

    render = filtered = sr[:, :3]
    expected = filtered + network(render, filtered)
    torch.testing.assert_close(refiner.refine(sr), expected)
    refiner.filters.table[:, -1] = 0.1  # brighter by 0.05 in [0, 1]
    filtered = render + 0.05
    torch.testing.assert_close(refiner.refine(sr), filtered + network(render, filtered))
    assert not torch.allclose(network(render, filtered), network(filtered, filtered))


def test_first_steps_open_the_tail():
    refiner = make_refiner()
    optimizer = torch.optim.Adam(refiner.parameters(), lr=1e-2)
    sr, high_res = draw_pair()
    for _ in range(3):
        optimizer.zero_grad()
        refiner_losses(refiner(sr, high_res), high_res, LossConfig()).loss.backward()
        optimizer.step()
    assert refiner.get_parameter("network.tail.0.weight").abs().min() > 0


def test_steps_leave_the_filters_as_they_were_solved():
    refiner = make_residual()
    sr, high_res = draw_pair()
    refiner.fit(views_of(sr, high_res))
    solved = refiner.filters.table.clone()
    assert solved.abs().max() > 1e-3
    optimizer = torch.optim.Adam(refiner.parameters(), lr=1e-2)
    refiner.losses(refiner, sr, high_res)["train/loss"].backward()
    optimizer.step()
    assert torch.equal(refiner.filters.table, solved)


def test_neighbours_join_the_nearest_code():
    sr, _ = draw_pair()
    table = torch.randn(16, 148, 3, generator=torch.Generator().manual_seed(2)) * 0.02
    refined = []
    for neighbours in (1, 3, 15, 99):
        refiner = make_residual(refiner__neighbours=neighbours)
        refiner.filters.table.copy_(table)
        refined.append(refiner.refine(sr))
    one, three, most, more = refined
    assert not torch.equal(one, three) and not torch.equal(three, most)
    assert torch.equal(most, more)  # there are 16 codes


def gradients(refiner: ResidualRefiner, weights: LossConfig) -> dict[str, torch.Tensor]:
    """Of the parameters with a gradient."""
    sr, high_res = draw_pair()
    refiner.zero_grad()
    refiner_losses(refiner(sr, high_res), high_res, weights).loss.backward()
    return {n: p.grad.clone() for n, p in refiner.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("imitation", ["vq", "ce"])
def test_the_refine_loss_teaches_codes_and_encoder(imitation: str):
    """By the shares of the codes, whatever the weights of the other losses."""
    knobs = {"codebook__ema": False, "codebook__imitation": imitation}
    found = gradients(wake(make_residual(**knobs)), REFINE_ALONE)
    codes = "autoencoder.quantizer.codebook"
    encoder = "encoder" if imitation == "vq" else "sr_encoder"
    for name in (codes, f"autoencoder.{encoder}.features.weight"):
        assert found[name].abs().max() > 1e-5
    by_coordinate = found[codes].abs().amax(0)
    assert by_coordinate.shape == (4 + 3,) and by_coordinate.min() > 1e-6  # positions, too
    if imitation == "ce":
        assert "autoencoder.encoder.features.weight" not in found or (
            found["autoencoder.encoder.features.weight"].abs().max() == 0
        )


def test_codes_that_move_by_the_refine_loss_refine_better():
    refiner = make_residual(codebook__ema=False, codebook__revive_below=0.0)
    refiner.filters.table[:, -1] = torch.linspace(-0.5, 0.5, 16)[:, None]
    sr, _ = draw_pair()
    high_res = sr[:, :3] + 0.1 * sr[:, 3:4]  # the brighter the further to the right
    optimizer = torch.optim.Adam([refiner.get_parameter("autoencoder.quantizer.codebook")], lr=0.02)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = refiner_losses(refiner(sr, high_res), high_res, REFINE_ALONE).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses


def test_codes_of_the_residual_refiner_ignore_constant_colour():
    refiner = make_refiner().eval()
    sr, high_res = draw_pair()
    plain, brighter = refiner(sr, high_res), refiner(sr, high_res + 0.3)
    assert torch.equal(plain.high_res_indices, brighter.high_res_indices)
    torch.testing.assert_close(brighter.reconstruction, plain.reconstruction + 0.3)


def draw_texture(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Renders with stripes, every second one on a chequerboard, and photographs in which stripes
    are sharper on the chequerboard and softer without."""
    stripes = 0.1 * torch.rand(count, 3, 1, 32).expand(-1, -1, 32, -1)
    detail = stripes - F.avg_pool2d(F.pad(stripes, (1,) * 4, mode="replicate"), 3, 1)
    board = 0.2 * ((torch.arange(32)[:, None] + torch.arange(32)) % 2)
    is_board = (torch.arange(count) % 2 == 1)[:, None, None, None]
    render = 0.4 + stripes + torch.where(is_board, board, 0)
    return render, render + torch.where(is_board, 0.5, -0.5) * detail


def remaining_error(
    refiner: Refiner, train: tuple[torch.Tensor, ...], test: tuple[torch.Tensor, ...]
) -> float:
    """Squared error of a fitted refiner on unseen views, as a part of that of their renders."""
    views = views_of(*train)
    refiner.start_from(views)
    refiner.eval().fit(views)
    renders, wanted = test
    errors = (refiner.refine(renders) - wanted, renders[:, :3] - wanted)
    after, before = (error[..., 4:-4, 4:-4].square().mean().item() for error in errors)
    return after / before


def test_codes_correct_each_kind_of_texture_in_its_own_way():
    """What is right for one kind is wrong for the other: no common filter can do both."""
    torch.manual_seed(0)
    train, test = draw_texture(16), draw_texture(16)
    linear, codes = (
        LinearRefiner(METHODS["linear"]),
        make_residual(codebook__dim=16, codebook__position_weight=0.0),
    )
    assert remaining_error(linear, train, test) > 0.9
    assert remaining_error(codes, train, test) < 0.1


def draw_halves(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Renders of one texture that are too dark in the left half of the scene and too bright in the
    right one; views show parts of it."""
    texture = 0.4 + 0.2 * torch.rand(count, 3, 32, 32)
    start = torch.rand(count, 1, 1)
    x = (2 * start - 1 + (torch.arange(32) - 15.5) / 32).expand(-1, 32, -1)
    y, depth = torch.rand(2, count, 32, 32)
    positions = torch.stack([x, y, 0.5 + 0.1 * depth], dim=1)
    return torch.cat([texture, positions], dim=1), texture + torch.where(x < 0, 0.1, -0.1)[:, None]


def test_codes_correct_each_place_in_its_own_way():
    """The texture is the same everywhere, so codes need positions to tell what is wrong."""
    torch.manual_seed(0)
    train, test = draw_halves(16), draw_halves(16)
    left = {
        weight: remaining_error(make_residual(codebook__position_weight=weight), train, test)
        for weight in (0.0, 2.0)
    }
    assert left[0.0] > 0.9
    assert left[2.0] < 0.4


@pytest.mark.parametrize("kernel", REACH)
def test_codes_learn_from_low_res_photographs(kernel: Kernel):
    """What differs from code to code is found in low-res pixels, and serves another view."""
    refiner = make_residual(codebook__size=4, refiner__neighbours=1, data__low_res_kernel=kernel)
    generator = torch.Generator().manual_seed(2)
    renders = place(0.35 + 0.3 * torch.rand(8, 3, 64, 64, generator=generator))
    truth = copy.deepcopy(refiner)
    truth.filters.table[:, -1] = 0.1 * torch.randn(len(truth.filters.table), 3)
    wanted = truth.refine(renders)
    refiner._back_project(views_of(renders[1:], downsample(wanted[1:], 2, kernel)))
    before = (renders[0, :3] - wanted[0]).square().mean()
    assert (refiner.refine(renders[:1])[0] - wanted[0]).square().mean() < 0.3 * before


def draw_slope(count: int, slope: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Renders of one texture, and photographs that are brighter the further to the right."""
    renders = place(0.35 + 0.3 * torch.rand(count, 3, 32, 32))
    return renders, renders[:, :3] + slope * (renders[:, 3:4] - 1)


def test_an_unseen_scene_takes_a_common_filter_from_others_and_codes_from_itself():
    torch.manual_seed(0)
    here, (renders, wanted) = draw_slope(4, -0.1), draw_slope(8, 0.2)
    elsewhere = here[0].clone(), here[1]
    elsewhere[0][:, 3:] += 1  # their pixels have other codes
    low_res = views_of(renders, downsample(wanted, 2, "box"))
    tables, left = {}, {}
    for name, sources in {"here": here, "elsewhere": elsewhere}.items():
        for unseen in (False, True):
            refiner = make_residual(refiner__consistency=10.0)
            refiner.start_from(views_of(renders, renders[:, :3]))
            refiner.fit(views_of(*sources), low_res if unseen else None)
            tables[name, unseen] = refiner.filters.table.clone()
            left[unseen] = (refiner.refine(renders) - wanted).square().mean()
    assert torch.equal(tables["here", True], tables["elsewhere", True])
    assert not torch.allclose(tables["here", False], tables["elsewhere", False])
    # What no common filter corrects, and other scenes do wrong.
    before = (renders[:, :3] - wanted).square().mean()
    assert left[True] < 0.5 * before < before < left[False]

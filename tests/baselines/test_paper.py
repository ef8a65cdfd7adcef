import pytest
import torch
from torch import nn

from cbnerf.baselines.paper import PaperAutoencoder, PaperDecoder, PaperEncoder, ResidualStack
from cbnerf.codebook.views import Views
from cbnerf.overrides import with_overrides
from cbnerf.presets import METHODS


def make_autoencoder(**knobs) -> PaperAutoencoder:
    torch.manual_seed(0)
    small = {"codebook.size": 32, "codebook.dim": 8} | knobs
    return PaperAutoencoder(with_overrides(METHODS["cb-nerf-paper"], small))


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_published_parameter_counts():
    assert count_parameters(PaperEncoder(64)) == 322_880 + 8_256
    assert count_parameters(PaperDecoder(64)) == 331_075
    assert count_parameters(PaperDecoder(64, with_skips=True)) == 612_675


def test_published_shapes():
    latents = PaperEncoder(64)(torch.rand(2, 3, 64, 64))
    assert latents.shape == (2, 64, 16, 16)
    decoded = PaperDecoder(64)(latents)
    assert decoded.image.shape == (2, 3, 64, 64)
    assert [tuple(skip.shape) for skip in decoded.skips] == [
        (2, 128, 16, 16), (2, 128, 16, 16), (2, 64, 32, 32),
    ]  # fmt: skip
    refined = PaperDecoder(64, with_skips=True)(latents, decoded.skips)
    assert refined.image.shape == (2, 3, 64, 64)


def test_residual_stack_behaves_like_in_place_relus():
    torch.manual_seed(0)
    stack = ResidualStack(4, 3)
    first, second = stack.layer[0], stack.layer[2]
    features = torch.randn(2, 4, 5, 5)
    expected = features.clone()
    for _ in range(2):
        branch = nn.Sequential(nn.ReLU(inplace=True), first, nn.ReLU(inplace=True), second)
        with torch.no_grad():
            kept = expected
            expected = branch(kept) + kept  # `kept` has gone through the in-place ReLU by now
    with torch.no_grad():
        torch.testing.assert_close(stack(features), expected.relu())


def test_exported_skips_stand_before_or_after_their_relu():
    torch.manual_seed(0)
    first, second, third = PaperDecoder(8)(torch.randn(1, 8, 4, 4)).skips
    assert first.min() == 0
    assert second.min() < 0 and third.min() < 0


@pytest.mark.parametrize("skips", ["hr", "sr", "mixed"])
def test_skips_come_from_the_patch_that_the_knob_names(skips: str):
    knobs = {"refiner.skips": skips, "codebook.kmeans_init": True}
    autoencoder = make_autoencoder(**knobs).eval()
    sr, high_res = torch.rand(2, 5, 3, 16, 16)
    views = Views(sr.split(1), high_res.split(1))
    autoencoder.start_from(views)
    chosen = autoencoder(sr, high_res).skips
    assert len(chosen) == 3
    pairs = zip(chosen, autoencoder.look_up(sr), autoencoder.look_up(high_res), strict=True)
    for skip, from_sr, from_high_res in pairs:
        assert not torch.allclose(from_sr, from_high_res)
        for row in range(5):
            is_sr = skips == "sr" or (skips == "mixed" and row % 2 == 1)
            torch.testing.assert_close(skip[row], (from_sr if is_sr else from_high_res)[row])


def test_the_published_autoencoder_learns_to_reconstruct_through_its_codes():
    knobs = {"refiner.skips": "hr", "codebook.ema": True, "codebook.normalize": True}
    autoencoder = make_autoencoder(**knobs)
    images = torch.rand(4, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3) * 2 - 1
    autoencoder.quantizer.start_from(autoencoder.encode(images, images).flatten(0, 2))
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=2e-3)
    errors = []
    for _ in range(60):
        optimizer.zero_grad()
        lookup = autoencoder(images, images)
        error = (lookup.reconstruction - images).square().mean()
        (error + lookup.vq_loss).backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.5 * errors[0]

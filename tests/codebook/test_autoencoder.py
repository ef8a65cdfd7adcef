from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cbnerf.codebook.autoencoder import (
    Decoder,
    Encoder,
    LightDecoder,
    LightEncoder,
    ResidualStack,
    VQAutoencoder,
)
from cbnerf.config import CodebookConfig


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_published_parameter_counts():
    assert count_parameters(Encoder(64)) == 322_880 + 8_256
    assert count_parameters(Decoder(64)) == 331_075
    assert count_parameters(Decoder(64, with_skips=True)) == 612_675


def test_published_shapes():
    latents = Encoder(64)(torch.rand(2, 3, 64, 64))
    assert latents.shape == (2, 64, 16, 16)
    decoded = Decoder(64)(latents)
    assert decoded.image.shape == (2, 3, 64, 64)
    assert [tuple(skip.shape) for skip in decoded.skips] == [
        (2, 128, 16, 16), (2, 128, 16, 16), (2, 64, 32, 32),
    ]  # fmt: skip
    refined = Decoder(64, with_skips=True)(latents, decoded.skips)
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
    first, second, third = Decoder(8)(torch.randn(1, 8, 4, 4)).skips
    assert first.min() == 0
    assert second.min() < 0 and third.min() < 0


def make_autoencoder(skips: Literal["hr", "sr", "mixed"]) -> VQAutoencoder:
    torch.manual_seed(0)
    config = CodebookConfig(size=16, dim=4)
    return VQAutoencoder(LightEncoder(4), LightDecoder(4), config, skips)


@pytest.mark.parametrize("skips", ["hr", "sr", "mixed"])
def test_skips_come_from_the_patch_that_the_knob_names(skips):
    autoencoder = make_autoencoder(skips).eval()
    sr, high_res = torch.rand(5, 3, 16, 16), torch.rand(5, 3, 16, 16)
    (from_sr,), (from_high_res,) = autoencoder.look_up(sr), autoencoder.look_up(high_res)
    (chosen,) = autoencoder(sr, high_res).skips
    for row in range(5):
        is_sr = skips == "sr" or (skips == "mixed" and row % 2 == 1)
        torch.testing.assert_close(chosen[row], (from_sr if is_sr else from_high_res)[row])


@pytest.mark.parametrize("imitation", ["vq", "feature", "ce"])
def test_imitation_leaves_the_hr_encoder_alone_if_renders_have_their_own(imitation):
    config = CodebookConfig(size=16, dim=4, imitation=imitation)
    for separate in (True, False):
        own = LightEncoder(4) if separate else None
        autoencoder = VQAutoencoder(LightEncoder(4), LightDecoder(4), config, "sr", own)
        autoencoder(torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)).imitation_loss.backward()
        untouched = [parameter.grad is None for parameter in autoencoder.encoder.parameters()]
        assert set(untouched) == {separate}


def test_only_the_hr_patch_is_reconstructed():
    autoencoder = make_autoencoder("sr")
    sr, high_res = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    expected = autoencoder(high_res, high_res).reconstruction
    torch.testing.assert_close(autoencoder(sr, high_res).reconstruction, expected)


def test_the_codebook_learns_from_the_hr_patch_alone():
    torch.manual_seed(0)
    config = CodebookConfig(size=16, dim=4, ema=True, revive_below=0.1)
    states = []
    high_res = torch.rand(2, 3, 16, 16)
    for _ in range(2):
        torch.manual_seed(1)
        autoencoder = VQAutoencoder(LightEncoder(4), LightDecoder(4), config, "mixed")
        torch.seed()
        autoencoder(torch.rand(2, 3, 16, 16), high_res)
        states.append(autoencoder.quantizer.state_dict())
    torch.testing.assert_close(states[0], states[1])


def test_the_published_autoencoder_learns_to_reconstruct_through_its_codes():
    torch.manual_seed(0)
    config = CodebookConfig(size=32, dim=8, ema=True, normalize=True)
    autoencoder = VQAutoencoder(Encoder(8), Decoder(8), config, "hr")
    images = torch.rand(4, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3) * 2 - 1
    autoencoder.quantizer.start_from(autoencoder.encode(images).flatten(0, 2))
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


@pytest.mark.parametrize("constant", [True, False])
def test_light_latents_start_as_principal_components(constant: bool):
    torch.manual_seed(0)
    images = F.avg_pool2d(torch.randn(3, 3, 22, 22), 3, 1)
    encoder = LightEncoder(6)
    encoder.start_from(images.split(1), constant=constant)
    latents = encoder(images)
    assert latents.shape == (3, 6, 20, 20)
    count = 5 if constant else 6
    if constant:
        torch.testing.assert_close(latents[:, -1], torch.full((3, 20, 20), 0.1))
    patches = F.unfold(images, 7, padding=3).movedim(1, 2).flatten(0, 1)
    components = latents[:, :count].movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(torch.linalg.svdvals(components),
                               torch.linalg.svdvals(patches)[:count], rtol=0.1, atol=0)  # fmt: skip
    assert encoder(torch.zeros(1, 3, 8, 8))[:, :count].abs().max() == 0


def test_few_pixels_bear_more_latents_than_components():
    encoder = LightEncoder(200)
    encoder.start_from([torch.rand(1, 3, 8, 8)], constant=True)
    assert encoder(torch.rand(1, 3, 8, 8)).isfinite().all()

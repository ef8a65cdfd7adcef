import pytest
import torch
import torch.nn.functional as F

from cbnerf.codebook.encoders import (
    LightDecoder,
    LightEncoder,
    VQAutoencoder,
)
from cbnerf.config import CodebookConfig


@pytest.mark.parametrize("imitation", ["vq", "feature", "ce"])
def test_imitation_leaves_the_hr_encoder_alone_if_renders_have_their_own(imitation):
    config = CodebookConfig(size=16, dim=4, imitation=imitation)
    for separate in (True, False):
        own = LightEncoder(4) if separate else None
        autoencoder = VQAutoencoder(LightEncoder(4), LightDecoder(4), config, own)
        autoencoder(torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)).imitation_loss.backward()
        untouched = [parameter.grad is None for parameter in autoencoder.encoder.parameters()]
        assert set(untouched) == {separate}


def test_only_the_hr_patch_is_reconstructed():
    autoencoder = VQAutoencoder(LightEncoder(4), LightDecoder(4), CodebookConfig(size=16, dim=4))
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
        autoencoder = VQAutoencoder(LightEncoder(4), LightDecoder(4), config)
        torch.seed()
        autoencoder(torch.rand(2, 3, 16, 16), high_res)
        states.append(autoencoder.quantizer.state_dict())
    torch.testing.assert_close(states[0], states[1])


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

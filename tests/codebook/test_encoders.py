import pytest
import torch
import torch.nn.functional as F

from cbnerf.codebook.encoders import (
    LightDecoder,
    LightEncoder,
    VQAutoencoder,
)
from cbnerf.codebook.views import Views
from cbnerf.config import CodebookConfig, LossConfig


@pytest.mark.parametrize("imitation", ["vq", "feature", "ce"])
def test_imitation_leaves_the_hr_encoder_alone_if_renders_have_their_own(imitation):
    config = CodebookConfig(size=16, dim=4, imitation=imitation)
    for separate in (True, False):
        own = LightEncoder(4) if separate else None
        autoencoder = VQAutoencoder(LightEncoder(4), LightDecoder(4), config, LossConfig(), own)
        autoencoder(torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)).imitation_loss.backward()
        untouched = [parameter.grad is None for parameter in autoencoder.encoder.parameters()]
        assert set(untouched) == {separate}


POSITIONED = CodebookConfig(size=16, dim=4, position_weight=2.0)


def draw_pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """SR patches with positions, and HR patches."""
    generator = torch.Generator().manual_seed(seed)
    joined = torch.rand(2, 9, 16, 16, generator=generator)
    return joined[:, :6], joined[:, 6:]


def make_positioned() -> VQAutoencoder:
    torch.manual_seed(0)
    return VQAutoencoder(
        LightEncoder(4), LightDecoder(4), POSITIONED, LossConfig(), LightEncoder(4)
    )


def test_latents_end_with_the_position_of_their_pixel():
    autoencoder = make_positioned()
    sr, high_res = draw_pair()
    for latents in (autoencoder.encode(high_res, sr), autoencoder.encode_sr(sr)):
        assert latents.shape == (2, 16, 16, 7)
        assert autoencoder.positions is not None
        assert torch.equal(latents[..., 4:], autoencoder.positions(sr[:, 3:]).movedim(1, -1))
    moved = torch.cat([sr[:, :3], sr[:, 3:] + 1], dim=1)
    change = autoencoder.encode_sr(moved) - autoencoder.encode_sr(sr)
    assert change[..., :4].abs().max() == 0 and change[..., 4:].min() > 1


def test_an_image_is_decoded_from_features_alone():
    autoencoder = make_positioned()
    latents = torch.randn(2, 16, 16, 7)
    elsewhere = torch.cat([latents[..., :4], torch.randn(2, 16, 16, 3)], dim=-1)
    torch.testing.assert_close(autoencoder.decode(latents), autoencoder.decode(elsewhere))
    assert autoencoder.decode(latents).image.std() > 0


def test_the_start_places_codes_in_the_scene():
    """K-means sees positions: codes of a scene of two places lie at both, and nowhere else."""
    config = CodebookConfig(size=16, dim=4, position_weight=2.0, kmeans_init=True)
    autoencoder = VQAutoencoder(LightEncoder(4), LightDecoder(4), config, LossConfig())
    sr, high_res = draw_pair()
    sr[0, 3:], sr[1, 3:] = 0.2, 0.6
    autoencoder.start_from(Views(sr.split(1), high_res.split(1)))
    assert autoencoder.positions is not None
    ends = autoencoder.positions(torch.tensor([0.2, 0.6])[:, None, None, None].expand(2, 3, 1, 1))
    codes = autoencoder.quantizer.codes()[:, 4:]
    distances = torch.cdist(codes, ends[..., 0, 0])
    assert distances.min(1).values.max() < 1e-3 * distances.max()
    assert {0, 1} == set(distances.argmin(1).tolist())


def test_scalars_ignore_positions():
    config = CodebookConfig(kind="fsq", size=64, position_weight=2.0)
    dim = config.feature_dim
    autoencoder = VQAutoencoder(LightEncoder(dim), LightDecoder(dim), config, LossConfig())
    sr, high_res = draw_pair()
    assert autoencoder.positions is None
    assert autoencoder.encode_sr(sr).shape == (2, 16, 16, dim)
    moved = torch.cat([sr[:, :3], sr[:, 3:] + 1], dim=1)
    found, elsewhere = autoencoder(sr, high_res), autoencoder(moved, high_res)
    assert torch.equal(found.sr_indices, elsewhere.sr_indices)


def test_only_the_hr_patch_is_reconstructed():
    config = CodebookConfig(size=16, dim=4)
    autoencoder = VQAutoencoder(LightEncoder(4), LightDecoder(4), config, LossConfig())
    sr, high_res = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    expected = autoencoder(high_res, high_res).reconstruction
    torch.testing.assert_close(autoencoder(sr, high_res).reconstruction, expected)


def test_what_only_losses_without_weight_read_is_not_computed():
    config = CodebookConfig(size=16, dim=4, imitation="ce")
    weights = LossConfig(lambda_recon=0.0, lambda_imitation=0.0)
    autoencoder = VQAutoencoder(LightEncoder(4), LightDecoder(4), config, weights, LightEncoder(4))
    autoencoder.decoder.register_forward_hook(lambda *_: pytest.fail("decoded"))
    sr, high_res = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    found = autoencoder(sr, high_res)
    assert torch.equal(found.reconstruction, high_res) and found.imitation_loss == 0
    # DistributedDataParallel waits for a gradient of each parameter that is trained.
    assert not any(parameter.requires_grad for parameter in autoencoder.decoder.parameters())
    found.vq_loss.backward()
    assert autoencoder.quantizer.codebook.grad is not None


def test_the_codebook_learns_from_the_hr_patch_alone():
    torch.manual_seed(0)
    config = CodebookConfig(size=16, dim=4, ema=True, revive_below=0.1)
    states = []
    high_res = torch.rand(2, 3, 16, 16)
    for _ in range(2):
        torch.manual_seed(1)
        autoencoder = VQAutoencoder(LightEncoder(4), LightDecoder(4), config, LossConfig())
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

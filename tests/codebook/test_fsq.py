import math

import pytest
import torch
from vector_quantize_pytorch import FSQ

from cbnerf.codebook.fsq import FiniteScalarQuantizer, build_quantizer
from cbnerf.codebook.imitation import imitation_loss
from cbnerf.codebook.nearest import find_nearest
from cbnerf.codebook.quantizer import VectorQuantizer, vq_loss
from cbnerf.codebook.refiner import refiner_losses
from cbnerf.config import FSQ_LEVELS, CodebookConfig
from cbnerf.overrides import with_overrides
from cbnerf.presets import preset
from cbnerf.training.models import build_refiner

every_size = pytest.mark.parametrize("size", FSQ_LEVELS)


def make_quantizer(size: int) -> FiniteScalarQuantizer:
    return FiniteScalarQuantizer(CodebookConfig(kind="fsq", size=size))


def draw(quantizer: FiniteScalarQuantizer, *shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, len(quantizer.levels), generator=generator)


@every_size
def test_the_number_of_codes_is_close_to_the_size(size: int):
    levels = FSQ_LEVELS[size]
    assert make_quantizer(size).num_codes == math.prod(levels)
    assert abs(math.prod(levels) / size - 1) < 0.07
    assert min(levels) >= 5  # FSQ, section 4.1


@every_size
def test_codes_and_indices_are_one_to_one(size: int):
    quantizer = make_quantizer(size)
    indices = torch.arange(quantizer.num_codes)
    codes = quantizer.codes()
    assert len(codes.unique(dim=0)) == quantizer.num_codes
    assert torch.equal(quantizer.indices_of(codes), indices)
    assert torch.equal(quantizer.codes_of(indices), codes)


@every_size
def test_the_grid_has_its_levels_evenly_spaced_in_each_dimension(size: int):
    codes = make_quantizer(size).codes()
    for column, levels in zip(codes.T, FSQ_LEVELS[size], strict=True):
        values = column.unique()
        assert len(values) == levels
        torch.testing.assert_close(values.diff(), torch.full((levels - 1,), 1 / (levels // 2)))
        assert values[0] == -1 and 0 in values


@every_size
def test_codes_and_gradients_match_vector_quantize_pytorch(size: int):
    quantizer, oracle = make_quantizer(size), FSQ(list(FSQ_LEVELS[size]))
    own, other = (draw(quantizer, 4, 500).requires_grad_() for _ in range(2))
    found, (codes, indices) = quantizer(own), oracle(other)
    assert torch.equal(found.indices, indices.long())
    torch.testing.assert_close(found.latents, codes)
    torch.testing.assert_close(quantizer.codes(), oracle.implicit_codebook)
    upstream = draw(quantizer, 4, 500, seed=3)
    found.latents.backward(upstream)
    codes.backward(upstream)
    torch.testing.assert_close(own.grad, other.grad)


def test_gradient_passes_the_rounding_as_if_it_were_not_there():
    quantizer = make_quantizer(1024)
    own, placed = (draw(quantizer, 50).requires_grad_() for _ in range(2))
    upstream = draw(quantizer, 50, seed=3)
    quantizer(own).latents.backward(upstream)
    quantizer.place(placed).backward(upstream)
    torch.testing.assert_close(own.grad, placed.grad)


def test_the_found_code_is_nearest_in_every_dimension_counted_in_levels():
    quantizer = make_quantizer(1024)
    latents = draw(quantizer, 300)
    half = quantizer.levels // 2
    nearest = find_nearest(quantizer.place(latents) * half, quantizer.codes() * half)
    assert torch.equal(quantizer(latents).indices, nearest)


def test_zero_stays_zero_and_extremes_reach_the_ends():
    quantizer = make_quantizer(4096)
    zero, low, high = (torch.full((1, 5), value) for value in (0.0, -1e3, 1e3))
    assert quantizer(zero).latents.abs().max() < 1e-6
    torch.testing.assert_close(quantizer(low).latents, torch.full((1, 5), -1.0))
    assert quantizer(low).indices.item() == 0
    assert quantizer(high).indices.item() == quantizer.num_codes - 1


def test_latents_all_over_the_place_use_all_codes():
    quantizer = make_quantizer(64)
    indices = quantizer(draw(quantizer, 20_000)).indices
    assert len(indices.unique()) == 64


def test_it_has_nothing_to_learn_and_no_loss():
    quantizer = make_quantizer(256)
    found = quantizer(draw(quantizer, 20))
    assert not list(quantizer.parameters()) and not quantizer.state_dict()
    assert vq_loss(found, quantizer.config).item() == 0


@pytest.mark.parametrize("kind", ["feature", "ce"])
def test_imitation_ends_at_the_codes_of_the_photograph(kind):
    quantizer = make_quantizer(64)
    high_res = quantizer(draw(quantizer, 40))
    latents = draw(quantizer, 40, seed=2).requires_grad_()
    optimizer = torch.optim.Adam([latents], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        imitation_loss(kind, latents, quantizer(latents), high_res, quantizer).backward()
        optimizer.step()
    assert (quantizer(latents).indices == high_res.indices).float().mean() > 0.95


@pytest.mark.parametrize("method", ["cb-nerf", "cb-nerf-paper"])
@pytest.mark.parametrize("imitation", ["feature", "ce"])
def test_refiners_train_with_it(method: str, imitation: str):
    knobs = {"codebook.kind": "fsq", "codebook.size": 256, "codebook.imitation": imitation}
    config = with_overrides(preset(method, "tiny"), knobs)
    refiner = build_refiner(config)
    sr, high_res = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    refinement = refiner(sr, high_res)
    assert 0 <= refinement.sr_indices.min() and refinement.sr_indices.max() < 240
    refiner_losses(refinement, high_res, config.loss).loss.backward()
    assert all(p.grad is not None for p in refiner.parameters() if p.requires_grad)
    assert refiner.refine(sr).shape == sr.shape


def test_the_kind_chooses_the_quantizer():
    assert isinstance(build_quantizer(CodebookConfig()), VectorQuantizer)
    assert isinstance(build_quantizer(CodebookConfig(kind="fsq")), FiniteScalarQuantizer)

import math

import pytest
import torch

from cbnerf.codebook import nearest as nearest_module
from cbnerf.codebook.imitation import imitation_loss, index_loss
from cbnerf.codebook.quantizer import VectorQuantizer, vq_loss
from cbnerf.config import CodebookConfig


@pytest.fixture
def quantizer() -> VectorQuantizer:
    quantizer = VectorQuantizer(CodebookConfig(size=3, dim=2, beta=0.25))
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 3.0]]))
    return quantizer


SR = torch.tensor([[0.5, 0.0], [0.0, 2.0]])
HIGH_RES = torch.tensor([[1.75, 0.0], [0.0, 2.5]])  # nearest codes 1 and 2; SR finds 0 and 2


@pytest.mark.parametrize(
    "kind, expected",
    [
        # Own nearest codes: (0.25 + 1) / 4 elements, times 1 + beta.
        ("vq", 1.25 * 1.25 / 4),
        # Codes of the HR latents: (1.5^2 + 1) / 4 elements.
        ("feature", 3.25 / 4),
        # Squared distances to the three codes, less that to the right one: -2, 7 and 3, 7.
        (
            "ce",
            (
                math.log(1 + math.exp(2.0) + math.exp(-7.0))
                + math.log(1 + math.exp(-3.0) + math.exp(-7.0))
            )
            / 2,
        ),
    ],
)
def test_losses_by_hand(kind, expected: float, quantizer: VectorQuantizer):
    loss = imitation_loss(kind, SR, quantizer(SR), quantizer(HIGH_RES), quantizer)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["vq", "feature", "ce"])
def test_imitation_pulls_sr_latents_and_never_the_hr_patch(kind, quantizer: VectorQuantizer):
    sr, high_res = SR.clone().requires_grad_(), HIGH_RES.clone().requires_grad_()
    loss = imitation_loss(kind, sr, quantizer(sr), quantizer(high_res), quantizer)
    to_sr, to_high_res, to_codes = torch.autograd.grad(
        loss, [sr, high_res, quantizer.codebook], allow_unused=True
    )
    assert to_high_res is None
    assert (to_codes is not None) == (kind == "vq")
    # The first SR latent lies between codes 0 (its own) and 1 (that of the HR patch).
    assert (to_sr[0, 0] > 0) == (kind == "vq")


@pytest.mark.parametrize("distances", [1, 20, 10**6])
def test_index_loss_is_the_negative_log_of_a_softmax_over_distances(distances, monkeypatch):
    monkeypatch.setattr(nearest_module, "_CPU_DISTANCES", distances)
    torch.manual_seed(0)
    latents, codes, indices = torch.randn(9, 4), torch.randn(6, 4), torch.randint(6, (9,))
    own, other = (latents.clone().requires_grad_() for _ in range(2))
    squared = ((own[:, None] - codes) ** 2).sum(-1)
    expected = -(-squared / 0.3).softmax(1)[range(9), indices].log().mean()
    loss = index_loss(other, indices, codes, 0.3)
    torch.testing.assert_close(loss, expected)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(other.grad, own.grad)


def test_index_loss_bears_distances_that_a_softmax_overflows_at():
    latents, codes = (
        torch.tensor([[1e3, 0.0]], requires_grad=True),
        torch.tensor([[-1e3, 0], [1e3, 0]]),
    )
    index_loss(latents, torch.tensor([0]), codes, 0.1).backward()
    # All belief in code 1, and code 0 is right: 2 / temperature times their difference.
    torch.testing.assert_close(latents.grad, torch.tensor([[4e4, 0.0]]))


@pytest.mark.parametrize("kind", ["feature", "ce"])
def test_sr_latents_learn_the_hr_codes(kind):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(CodebookConfig(size=8, dim=4, normalize=True))
    high_res = quantizer(torch.randn(64, 4))
    latents = torch.nn.Parameter(torch.randn(64, 4))
    optimizer = torch.optim.Adam([latents], lr=0.1)
    assert (quantizer(latents).indices == high_res.indices).float().mean() < 0.5
    for _ in range(100):
        optimizer.zero_grad()
        imitation_loss(kind, latents, quantizer(latents), high_res, quantizer).backward()
        optimizer.step()
    assert torch.equal(quantizer(latents).indices, high_res.indices)


def test_the_papers_imitation_is_the_vq_loss_of_the_sr_patch(quantizer: VectorQuantizer):
    sr = quantizer(SR)
    loss = imitation_loss("vq", SR, sr, quantizer(HIGH_RES), quantizer)
    assert loss.item() == vq_loss(sr, quantizer.config).item()

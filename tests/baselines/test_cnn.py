import pytest
import torch
from torch import Tensor

from cbnerf.baselines.cnn import CNNRefiner
from cbnerf.codebook.network import ResidualNetwork
from cbnerf.codebook.residual import ResidualRefiner
from cbnerf.config import Config
from cbnerf.overrides import with_overrides
from cbnerf.presets import METHODS
from cbnerf.training.models import build_refiner

SMALL = {"refiner.channels": 6, "refiner.blocks": 2}


def make(method: str = "cnn") -> tuple[Config, CNNRefiner | ResidualRefiner]:
    torch.manual_seed(0)
    config = with_overrides(METHODS[method], SMALL)
    refiner = build_refiner(config)
    assert isinstance(refiner, CNNRefiner | ResidualRefiner)
    return config, refiner


def draw(height: int = 16, width: int = 16) -> Tensor:
    return 0.25 + 0.5 * torch.rand(2, 6, height, width, generator=torch.Generator().manual_seed(1))


def wake(network: ResidualNetwork) -> None:
    torch.nn.init.normal_(
        network.get_parameter("tail.0.weight"), std=0.05,
        generator=torch.Generator().manual_seed(2),
    )  # fmt: skip


def test_it_is_the_network_of_cb_nerf_without_the_filtered_image():
    shapes = []
    for method in ("cnn", "cb-nerf"):
        network = make(method)[1].network
        shapes.append({name: tuple(p.shape) for name, p in network.named_parameters()})
    assert [shape.pop("head.1.weight") for shape in shapes] == [(6, 12, 3, 3), (6, 24, 3, 3)]
    assert shapes[0] == shapes[1]


def test_it_starts_as_the_identity_and_ignores_positions():
    _, refiner = make()
    sr = draw()
    torch.testing.assert_close(refiner.refine(sr), sr[:, :3])
    wake(refiner.network)
    refined = refiner.refine(sr)
    assert not torch.allclose(refined, sr[:, :3])
    sr[:, 3:] += 1
    assert torch.equal(refiner.refine(sr), refined)


@pytest.mark.parametrize("tile", [16, 23, 100])
def test_tiles_give_the_whole_image(tile: int):
    _, refiner = make()
    wake(refiner.network)
    sr = draw(70, 53)
    torch.testing.assert_close(refiner.refine(sr, tile=tile), refiner.refine(sr))


def test_every_parameter_learns_from_the_l1_alone():
    _, refiner = make()
    wake(refiner.network)
    sr = draw()
    losses = refiner.losses(refiner, sr, sr[:, :3] + 0.1)
    assert set(losses) == {"train/loss"}
    expected = (refiner(sr) - sr[:, :3] - 0.1).abs().mean() * 2  # of values in [-1, 1]
    torch.testing.assert_close(losses["train/loss"], expected)
    losses["train/loss"].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in refiner.parameters())

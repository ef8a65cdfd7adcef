import pytest
import torch

from cbnerf.codebook.positions import Positions


def draw(seed: int, count: int, channels: int) -> list[torch.Tensor]:
    """Images whose channels have different means and deviations."""
    generator = torch.Generator().manual_seed(seed)
    by_channel = torch.arange(1.0, channels + 1)[:, None, None]
    return [
        by_channel * (3 + torch.rand(1, channels, 9, 7, generator=generator)) for _ in range(count)
    ]


def pixels(images: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([image.flatten(2) for image in images], dim=2)[0]


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_positions_spread_about_zero_as_far_as_the_weight_says(weight: float):
    positions, features = draw(0, 3, 3), draw(1, 3, 5)
    layer = Positions(weight)
    layer.start_from(positions, features)
    placed = pixels([layer(image) for image in positions])
    torch.testing.assert_close(placed.mean(1), torch.zeros(3), atol=1e-4, rtol=0)
    spread = pixels(features).std(1, correction=0).norm()
    torch.testing.assert_close(placed.std(1, correction=0), (weight * spread).expand(3))


def test_a_coordinate_that_does_not_vary_is_not_blown_up():
    positions = [image.clone() for image in draw(0, 3, 3)]
    for image in positions:
        image[:, 2] = 0.5
    features = draw(1, 3, 5)
    layer = Positions(2.0)
    layer.start_from(positions, features)
    spread = pixels(features).std(1, correction=0).norm()
    noisy = [image + 2**-12 * torch.tensor([0, 0, 1.0])[:, None, None] for image in positions]
    moved = pixels([layer(image) for image in noisy])[2]
    # The last bit of a float16 at 0.5 moves the coordinate by less than the others spread.
    assert moved.abs().max() < 2 * spread


def test_positions_are_restored_with_the_refiner():
    layer, restored = Positions(2.0), Positions(2.0)
    positions = draw(0, 2, 3)
    layer.start_from(positions, draw(1, 2, 5))
    restored.load_state_dict(layer.state_dict())
    assert torch.equal(restored(positions[0]), layer(positions[0]))
    assert not [*layer.parameters()]  # they are measured, not trained

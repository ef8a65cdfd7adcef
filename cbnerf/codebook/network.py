"""The convolutional network of the refiners `residual` and `cnn`."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ResidualBlock(nn.Sequential):
    def __init__(self, channels: int):
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(
        self, features: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        return features + super().forward(features)


class ResidualNetwork(nn.Module):
    """A correction of images, zero at first. It works at half resolution: its receptive field
    reaches 2 pixels there for each block and 1 for each of head and tail."""

    def __init__(self, inputs: int, channels: int, blocks: int):
        super().__init__()
        self.head = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(4 * inputs, channels, 3, padding=1)
        )
        self.blocks = nn.Sequential(*(ResidualBlock(channels) for _ in range(blocks)))
        tail = nn.Conv2d(channels, 12, 3, padding=1)
        nn.init.zeros_(tail.weight)
        nn.init.zeros_(tail.bias)  # pyright: ignore[reportArgumentType]
        self.tail = nn.Sequential(tail, nn.PixelShuffle(2))

    def forward(
        self, images: Float[Tensor, "batch inputs height width"]
    ) -> Float[Tensor, "batch 3 height width"]:
        # Channels last makes convolutions faster, on a CPU by a fifth.
        images = images.contiguous(memory_format=torch.channels_last)
        return self.tail(self.blocks(self.head(images)))

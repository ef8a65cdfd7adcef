"""The published refiner of Codebook-NeRF: a VQ autoencoder with one code per 4x4 pixels, and an
encoder-decoder of the render that takes the decoder features of the codes as skips.

Conventions as in `codebook.refiner` and `codebook.encoders`.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cbnerf.codebook.encoders import STRIDE, Decoded, Decoder, Encoder, SRBatch, VQAutoencoder
from cbnerf.codebook.refiner import CodebookRefiner
from cbnerf.config import Config

# The patches of a batch whose skips are those of SR codes in training.
_SR_ROWS = {"hr": slice(0, 0), "sr": slice(None), "mixed": slice(1, None, 2)}


class ResidualStack(nn.Module):
    """One residual layer applied twice (with shared weights, as in the released code)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.layer = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1, bias=False),
        )

    def forward(
        self, features: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        for _ in range(2):
            # The first ReLU of the released code is in-place, so it acts on the identity path too.
            features = features.relu()
            features = features + self.layer(features)
        return features.relu()


class PaperEncoder(nn.Sequential, Encoder):
    """The published encoder, 4x4 pixels per latent; the refiner has a second one."""

    stride = STRIDE
    imitated = 1

    def __init__(self, dim: int):
        super().__init__(
            nn.Conv2d(3, 64, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 128, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(128, 128, 3, padding=1),
            ResidualStack(128, 32),
            nn.Conv2d(128, dim, 1),
        )


class PaperDecoder(Decoder):
    """The published decoder; with `with_skips` that of the refiner, which takes skips as input."""

    def __init__(self, dim: int, *, with_skips: bool = False):
        super().__init__()
        wide = 2 if with_skips else 1
        self.stage1 = nn.Sequential(nn.ConvTranspose2d(dim, 128, 1), ResidualStack(128, 32))
        self.stage2 = nn.ConvTranspose2d(wide * 128, 128, 3, padding=1)
        self.stage3 = nn.ConvTranspose2d(wide * 128, 64, 4, stride=2, padding=1)
        self.stage4 = nn.ConvTranspose2d(wide * 64, 3, 4, stride=2, padding=1)

    def forward(
        self,
        latents: Float[Tensor, "batch dim rows columns"],
        skips: tuple[Float[Tensor, "batch _ _ _"], ...] = (),
    ) -> Decoded:
        def join(features: Tensor, i: int) -> Tensor:
            return torch.cat([features, skips[i]], dim=1) if skips else features

        first = self.stage1(latents)
        second = self.stage2(join(first, 0))
        third = self.stage3(join(second, 1).relu())
        return Decoded(self.stage4(join(third, 2).relu()), (first, second, third))


class PaperAutoencoder(VQAutoencoder):
    """The published autoencoder; `refiner.skips` chooses the codes whose features train the
    refiner."""

    def __init__(self, config: Config):
        dim = config.codebook.latent_dim
        super().__init__(PaperEncoder(dim), PaperDecoder(dim), config.codebook, config.loss)
        self._sr_rows = _SR_ROWS[config.refiner.skips]

    @property
    def _decodes(self) -> bool:
        return True  # The refiner reads the skips.

    def _decode_pair(self, high_res: Tensor, sr: Tensor) -> Decoded:
        batch, used = len(high_res), sr[self._sr_rows]
        decoded = self.decode(torch.cat([high_res, used]) if len(used) else high_res)
        skips = []
        for features in decoded.skips:
            skip = features[:batch].clone()
            skip[self._sr_rows] = features[batch:]
            skips.append(skip)
        return Decoded(decoded.image[:batch], tuple(skips))

    def look_up(self, sr: SRBatch) -> tuple[Float[Tensor, "batch _ _ _"], ...]:
        """Skips of the nearest codes of SR images: the only input from codes at test time."""
        return self.decode(self.quantizer(self.encode_sr(sr), learn=False).latents).skips


class PaperRefiner(CodebookRefiner):
    """The published refiner: the whole image goes through a quarter of its resolution."""

    autoencoder: PaperAutoencoder

    def __init__(self, config: Config):
        dim = config.codebook.latent_dim
        super().__init__(PaperAutoencoder(config), config.loss)
        self.encoder = PaperEncoder(dim)
        self.decoder = PaperDecoder(dim, with_skips=True)
        # Cells: 4 of an encoder, 4 of a decoder, on the way of the image and on that of the codes.
        self.halo = STRIDE * 8
        self.apply(_init_kaiming)

    def _sharpen(self, sr: Tensor, skips: tuple[Tensor, ...]) -> Tensor:
        return self.decoder(self.encoder(sr[:, :3]), skips).image

    def _refine(self, sr: Tensor) -> Tensor:
        return self._sharpen(sr, self.autoencoder.look_up(sr))


def _init_kaiming(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.kaiming_normal_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)

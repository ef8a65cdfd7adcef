"""The codebook refiner of `cb-nerf`: filters that depend on the codes of a pixel, then a small CNN.

Images inside are `[batch 3 height width]` in [-1, 1], with sides divisible by 4; SR images have
three further channels, the positions of their pixels.
"""

import copy

import torch
from jaxtyping import Float
from torch import Tensor

from cbnerf.codebook.consistency import fit_consistent_filter
from cbnerf.codebook.encoders import (
    STRIDE,
    LightDecoder,
    LightEncoder,
    SRBatch,
    VQAutoencoder,
    fill,
    pad,
)
from cbnerf.codebook.filters import CodeFilters, Corrections
from cbnerf.codebook.nearest import Neighbours
from cbnerf.codebook.neighbourhoods import SIDE
from cbnerf.codebook.network import ResidualNetwork
from cbnerf.codebook.refiner import CodebookRefiner
from cbnerf.codebook.views import MadeOnDemand, Views
from cbnerf.config import Config
from cbnerf.downsampling import Kernel, downsample, spread

_PASSES = 4
"""Iterations of back-projection; more gain next to nothing on held-out views."""


class ResidualRefiner(CodebookRefiner):
    """Each pixel is corrected by the filters of its codes, then a small CNN corrects the result.

    Filters are solved by `fit`, the CNN and the autoencoder are trained by gradients: the refined
    image depends on latents and codes through the shares of the nearest codes. The CNN works at
    half resolution, sees the image before and after the filters, and starts as zero. The codes
    describe detail and position only, for structure is in the render.
    """

    solves_unseen = True
    turns_patches = False
    margin = SIDE // 2

    def __init__(self, config: Config):
        encoder = LightEncoder(config.codebook.feature_dim)
        decoder = LightDecoder(config.codebook.feature_dim)
        # Differs from reference: renders have an encoder of their own, which starts as that of the
        # HR patches. With `vq` nothing would tie the two, and all renders would find one code.
        sr_encoder = None if config.codebook.imitation == "vq" else copy.deepcopy(encoder)
        autoencoder = VQAutoencoder(encoder, decoder, config.codebook, config.loss, sr_encoder)
        super().__init__(autoencoder, config.loss)
        # It sees the render and the filtered image.
        self.network = ResidualNetwork(6, config.refiner.channels, config.refiner.blocks)
        num_codes = autoencoder.quantizer.num_codes
        self._neighbours = min(config.refiner.neighbours, num_codes - 1)
        self._ridge = config.refiner.ridge
        self._consistency = config.refiner.consistency
        self._low_res_kernel: Kernel = config.data.low_res_kernel
        self.filters = CodeFilters(num_codes)
        # The network; before it filters of 3 pixels and codes: 1 cell of the smooth image, 3 pixels
        # of their encoder.
        self.halo = STRIDE * (config.refiner.blocks + 1 + 3)

    @torch.no_grad()
    def fit(self, views: Views, low_res: Views | None = None) -> None:
        """Solve the filters of all codes for these views.

        With `low_res`, a scene other than those of `views`, these give one filter for all codes.
        The filter that makes refined views consistent with `low_res` is added, then they are
        back-projected code by code.
        """

        def correct(view: int) -> Corrections:
            sr = pad(views.renders[view])
            target = pad(views.photographs[view]) - sr[:, :3]
            return Corrections(sr[0, :3], self._find_codes(sr[0]), target[0])

        corrections = MadeOnDemand(correct, range(len(views.renders)))
        if low_res is None:
            self.filters.fit(corrections, self._ridge)
        else:
            self.filters.fit_common(corrections)
            self.add_filter(
                fit_consistent_filter(self.refine, low_res, self._consistency, self._low_res_kernel)
            )
            self._back_project(low_res)

    def _back_project(self, low_res: Views) -> None:
        """Fit the filters, in a few passes, to the residuals of refined views against their low-res
        photographs; each residual is spread over the pixels that its low-res pixel covers."""
        kernel = self._low_res_kernel
        scale = low_res.renders[0].shape[-1] // low_res.photographs[0].shape[-1]
        residuals: list[Tensor] = []

        def correct(view: int) -> Corrections:
            sr = pad(low_res.renders[view])[0]
            target = fill(2 * spread(residuals[view], scale, kernel))
            return Corrections(sr[:3], self._find_codes(sr), target[0])

        for _ in range(_PASSES):
            residuals[:] = [
                photograph - downsample(self.refine(render), scale, kernel)
                for render, photograph in zip(low_res.renders, low_res.photographs, strict=True)
            ]
            filters = copy.deepcopy(self.filters)
            # Pixels that share a residual count as one, and the filters of all passes add up.
            ridge = self._ridge * scale**2 * _PASSES
            filters.fit(MadeOnDemand(correct, range(len(residuals))), ridge)
            self.filters.table.add_(filters.table)

    @torch.no_grad()
    def add_filter(self, filter: Float[Tensor, "inputs 3"]) -> None:
        """Add a filter of the render in [0, 1] to those of all codes."""
        # x = (signed + 1) / 2: colours keep their factors, the constant takes what they lose.
        constant = filter[:-1].sum(0) + 2 * filter[-1]
        self.filters.table.add_(torch.cat([filter[:-1], constant[None]]))

    def _sharpen(self, sr: SRBatch, skips: tuple[Tensor, ...]) -> Tensor:
        render = sr[:, :3]
        filtered = render + torch.stack(
            [self.filters(image[:3], self._find_codes(image)) for image in sr]
        )
        return filtered + self.network(torch.cat([render, filtered], dim=1))

    def _refine(self, sr: SRBatch) -> Tensor:
        return self._sharpen(sr, ())

    def _find_codes(self, sr: Float[Tensor, "channels height width"]) -> Neighbours:
        """The nearest codes of each pixel, `[height width neighbours]`."""
        found = self.autoencoder.find_neighbours(sr[None], self._neighbours)
        return Neighbours(*(part[0] for part in found))

"""Image quality of full views, measured on what would be saved: clamped, 8 bit, in [0, 1]."""

import math
from importlib.util import find_spec

import pytorch_msssim
import torch
from jaxtyping import Float, UInt8
from torch import Tensor


def to_8bit(image: Float[Tensor, "*image"]) -> UInt8[Tensor, "*image"]:
    """Clamp to [0, 1] and round to the nearest of 256 levels."""
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def psnr(image: UInt8[Tensor, "height width 3"], target: UInt8[Tensor, "height width 3"]) -> float:
    """Peak signal-to-noise ratio in dB, peak 255; infinite for equal images."""
    error = (image.double() - target.double()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf


def ssim(image: UInt8[Tensor, "height width 3"], target: UInt8[Tensor, "height width 3"]) -> float:
    """Structural similarity with an 11 x 11 Gaussian window of sigma 1.5 that stays inside."""
    pair = (x.movedim(-1, 0)[None].float() / 255 for x in (image, target))
    return pytorch_msssim.ssim(*pair, data_range=1.0, win_size=11, win_sigma=1.5).item()


def flip(
    image: UInt8[Tensor, "height width 3"], target: UInt8[Tensor, "height width 3"]
) -> float | None:
    """LDR-FLIP (Andersson et al., 2020): the difference that eyes see when both images alternate.

    Mean over pixels in [0, 1], 0 for equal images, sRGB seen at 67 pixels per degree; None if the
    extra `flip` is not installed.
    """
    if find_spec("flip_evaluator") is None:
        return None
    import flip_evaluator  # pyright: ignore[reportMissingImports]

    test, reference = (x.numpy(force=True).astype("float32") / 255 for x in (image, target))
    _, mean, _ = flip_evaluator.evaluate(reference, test, "LDR", applyMagma=False)
    return float(mean)

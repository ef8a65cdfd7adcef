"""LPIPS, if the weights of its VGG network are on this machine; nothing is downloaded."""

import importlib.util
import os
from collections.abc import Callable

import torch
from jaxtyping import UInt8
from torch import Tensor

Distance = Callable[[UInt8[Tensor, "height width 3"], UInt8[Tensor, "height width 3"]], float]

WEIGHTS_FILE = "vgg16-397923af.pth"
"""torchvision's name for VGG-16 trained on ImageNet."""


def load_lpips(device: torch.device) -> tuple[Distance | None, str]:
    """LPIPS (VGG) as a function of two 8-bit images, or None; and a sentence for the report."""
    for package in ("torchvision", "torchmetrics"):
        if importlib.util.find_spec(package) is None:
            return None, f"LPIPS is not reported: {package} is not installed (the extra `lpips`)"
    file = os.path.join(torch.hub.get_dir(), "checkpoints", WEIGHTS_FILE)
    if not os.path.exists(file):
        return None, f"LPIPS is not reported: the weights of its network are not in {file}"
    try:
        from torchmetrics.image.lpip import (  # pyright: ignore[reportMissingImports]
            LearnedPerceptualImagePatchSimilarity,
        )

        network = LearnedPerceptualImagePatchSimilarity("vgg", normalize=True).to(device).eval()
    except (ImportError, RuntimeError) as error:  # torchvision was built for another torch
        return None, f"LPIPS is not reported: torchvision does not work here ({error})"

    @torch.no_grad()
    def distance(image: Tensor, target: Tensor) -> float:
        network.reset()
        pair = (x.movedim(-1, 0)[None].to(device).float() / 255 for x in (image, target))
        return float(network(*pair))

    return distance, "LPIPS is that of VGG-16, without a crop"

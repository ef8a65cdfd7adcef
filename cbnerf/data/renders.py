"""Stage-1 renders of a scene on disk: what stage 2 starts from."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float16, UInt8
from torch import Tensor


class Renders(NamedTuple):
    """High-res renders of some views, in their order."""

    rgb: UInt8[Tensor, "views height width 3"]
    depth: Float16[Tensor, "views height width"]
    """NDC distance t in [0, 1]; the metric depth is 1 / (1 - t)."""


def save_renders(renders: Renders, path: Path) -> None:
    np.savez(path, rgb=renders.rgb.numpy(), depth=renders.depth.numpy())


def load_renders(path: Path) -> Renders:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return Renders(torch.from_numpy(stored["rgb"]), torch.from_numpy(stored["depth"]))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file of stage-1 renders") from None
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a file of stage-1 renders ({error})") from None

"""Stage-1 renders of a scene on disk, the input of stage 2."""

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float16, UInt8
from torch import Tensor


class Renders(NamedTuple):
    """High-res renders of some views, in order."""

    rgb: UInt8[Tensor, "views height width 3"]
    depth: Float16[Tensor, "views height width"]
    """NDC distance t in [0, 1]; the metric depth is 1 / (1 - t)."""


def save_renders(renders: Renders, path: Path) -> None:
    np.savez(path, rgb=renders.rgb.numpy(), depth=renders.depth.numpy())


def load_renders(path: Path) -> Renders:
    try:
        with zipfile.ZipFile(path) as archive:
            rgb, depth = (_read_array(archive, name) for name in Renders._fields)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file of stage-1 renders") from None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a file of stage-1 renders ({error})") from None
    types = (rgb.dtype, depth.dtype) == (np.uint8, np.float16)
    if not types or depth.ndim != 3 or rgb.shape != (*depth.shape, 3):
        raise ValueError(
            f"{path}: not a file of stage-1 renders (holds {rgb.dtype} {rgb.shape} and "
            f"{depth.dtype} {depth.shape})"
        )
    return Renders(torch.from_numpy(rgb), torch.from_numpy(depth))


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)

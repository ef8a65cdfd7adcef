"""Stage-1 renders of a scene on disk, the input of stage 2."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float16, UInt8
from torch import Tensor


class Renders(NamedTuple):
    """High-res renders of some views, in order."""

    rgb: UInt8[Tensor, "views height width 3"]
    positions: Float16[Tensor, "views height width 3"]
    """The point that each pixel shows: NDC x and y, and the NDC distance t in [0, 1]; the metric
    depth is 1 / (1 - t)."""

    @property
    def depth(self) -> Float16[Tensor, "views height width"]:
        """NDC distance t of each pixel."""
        return self.positions[..., 2]

    def of(self, views: Sequence[int]) -> "Renders":
        """The renders of some of the views."""
        return Renders(self.rgb[list(views)], self.positions[list(views)])


def save_renders(renders: Renders, path: Path) -> None:
    np.savez(path, rgb=renders.rgb.numpy(), positions=renders.positions.numpy())


def load_renders(path: Path) -> Renders:
    try:
        with zipfile.ZipFile(path) as archive:
            rgb, positions = (_read_array(archive, name) for name in Renders._fields)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file of stage-1 renders") from None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise _unreadable(path, str(error)) from None
    types = (rgb.dtype, positions.dtype) == (np.uint8, np.float16)
    if not types or rgb.shape[3:] != (3,) or rgb.shape != positions.shape:
        held = f"it holds {rgb.dtype} {rgb.shape} and {positions.dtype} {positions.shape}"
        raise _unreadable(path, held)
    return Renders(torch.from_numpy(rgb), torch.from_numpy(positions))


def _unreadable(path: Path, why: str) -> ValueError:
    return ValueError(f"{path}: not a file of stage-1 renders ({why}); train stage 1 again")


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)

"""Comparisons of arrays and files whose failures fit into some lines."""

import hashlib
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
from torch import Tensor

AnyArray = Tensor | np.ndarray


def assert_same(found: AnyArray, expected: AnyArray, name: str = "array") -> None:
    """Equal in shape, type and every element; says how many are not, and by how much."""
    here, there = (x.detach().numpy() if isinstance(x, Tensor) else x for x in (found, expected))
    kinds = [f"{x.dtype} {[*x.shape]}" for x in (here, there)]
    if kinds[0] != kinds[1]:
        raise AssertionError(f"{name}: {kinds[0]}, not {kinds[1]}")
    differs = here != there
    if differs.any():
        largest = np.abs(here.astype(np.float64) - there.astype(np.float64)).max()
        raise AssertionError(
            f"{name}: {differs.sum()} of {here.size} values of {kinds[0]} differ, by {largest:g} "
            f"at most, first at {[int(i) for i in np.argwhere(differs)[0]]}"
        )


def assert_same_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal state dicts."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_same(found[name], value, name)


def assert_same_files(folder: Path, other: Path) -> None:
    """The same names and bytes; of pictures it says how they differ."""
    names = [sorted(file.name for file in place.iterdir()) for place in (folder, other)]
    assert names[0] == names[1]
    for name in names[0]:
        here, there = folder / name, other / name
        if here.read_bytes() == there.read_bytes():
            continue
        if here.suffix == ".png":
            assert_same(iio.imread(here), iio.imread(there), name)
        sizes = f"{here.stat().st_size} and {there.stat().st_size}"
        raise AssertionError(f"{name}: other bytes, {sizes} of them")


def read_files(folder: Path) -> dict[str, bytes]:
    """The content of each file of a folder, by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def shorten(value: Any) -> Any:
    """A value for a message: size and hash in place of more than 40 bytes, also in containers."""
    if isinstance(value, bytes) and len(value) > 40:
        return f"<{len(value)} bytes, sha256 {hashlib.sha256(value).hexdigest()[:12]}>"
    if isinstance(value, dict):
        return {key: shorten(one) for key, one in value.items()}
    return type(value)(map(shorten, value)) if type(value) in (list, tuple) else value

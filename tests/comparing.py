"""Comparisons of big arrays whose failures fit into some lines."""

from pathlib import Path

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


def read_hashes(folder: Path) -> dict[str, int]:
    """A number for the content of each file, which a failure prints in place of its bytes."""
    return {file.name: hash(file.read_bytes()) for file in folder.iterdir() if file.is_file()}

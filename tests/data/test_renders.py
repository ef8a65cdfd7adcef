from pathlib import Path

import numpy as np
import pytest
import torch

from cbnerf.data.renders import Renders, load_renders, save_renders


def test_renders_read_back(tiny_renders: Renders, tmp_path: Path):
    save_renders(tiny_renders, tmp_path / "renders.npz")
    stored = load_renders(tmp_path / "renders.npz")
    assert torch.equal(stored.rgb, tiny_renders.rgb)
    assert torch.equal(stored.depth, tiny_renders.depth)


def save_pickled(path: Path) -> None:
    np.savez(path, rgb=np.array([{}], dtype=object), depth=np.zeros(1))


def save_plain_array(path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))


MALFORMED = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"hello"),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "bits flipped": lambda path: path.write_bytes(path.read_bytes().replace(b"\x80", b"\x7f")),
    "other arrays": lambda path: np.savez(path, a=np.zeros(3)),
    "wrong type": lambda path: np.savez(
        path, rgb=np.zeros((1, 2, 2, 3)), depth=np.zeros((1, 2, 2))
    ),
    "wrong shape": lambda path: np.savez(
        path, rgb=np.zeros((1, 2, 3), np.uint8), depth=np.zeros((1, 2), np.float16)
    ),
    "plain array": save_plain_array,
    "pickled": save_pickled,
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_named_in_one_line(case: str, tiny_renders: Renders, tmp_path: Path):
    path = tmp_path / "renders.npz"
    save_renders(tiny_renders, path)
    MALFORMED[case](path)
    with pytest.raises(ValueError, match="renders.npz: not a file of stage-1 renders") as error:
        load_renders(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="none.npz: no such file of stage-1 renders"):
        load_renders(tmp_path / "none.npz")

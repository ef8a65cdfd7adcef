from pathlib import Path

import numpy as np
import pytest
import torch

from cbnerf.data.renders import Renders, load_renders, save_renders


def test_renders_read_back(tiny_renders: Renders, tmp_path: Path):
    save_renders(tiny_renders, tmp_path / "renders.npz")
    stored = load_renders(tmp_path / "renders.npz")
    assert torch.equal(stored.rgb, tiny_renders.rgb)
    assert torch.equal(stored.positions, tiny_renders.positions)
    assert torch.equal(stored.depth, tiny_renders.positions[..., 2])


def test_some_views_are_chosen_in_the_order_asked_for(tiny_renders: Renders):
    some = tiny_renders.of([5, 2])
    for part, whole in zip(some, tiny_renders, strict=True):
        assert torch.equal(part[0], whole[5]) and torch.equal(part[1], whole[2])
    assert tiny_renders.of([]).depth.shape == (0, 48, 64)


def save_pickled(path: Path) -> None:
    np.savez(path, rgb=np.array([{}], dtype=object), positions=np.zeros(1))


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
        path, rgb=np.zeros((1, 2, 2, 3)), positions=np.zeros((1, 2, 2, 3))
    ),
    "wrong shape": lambda path: np.savez(
        path, rgb=np.zeros((1, 2, 3), np.uint8), positions=np.zeros((1, 2, 3), np.float16)
    ),
    "other sizes": lambda path: np.savez(
        path, rgb=np.zeros((1, 2, 2, 3), np.uint8), positions=np.zeros((1, 2, 1, 3), np.float16)
    ),
    "depth alone, as saved once": lambda path: np.savez(
        path, rgb=np.zeros((1, 2, 2, 3), np.uint8), depth=np.zeros((1, 2, 2), np.float16)
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

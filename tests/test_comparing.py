"""A failed comparison of arrays or files says in a few lines what differs."""

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from comparing import assert_same, assert_same_files, assert_same_state, shorten


def test_arrays_are_the_same_in_shape_type_and_value():
    zeros = torch.zeros(2, 3)
    assert_same(zeros, zeros.clone())
    assert_same(zeros.numpy(), zeros)
    for other, message in (
        (torch.zeros(3, 2), r"float32 \[2, 3\], not float32 \[3, 2\]"),
        (torch.zeros(2, 3, dtype=torch.int32), "float32 .*, not int32"),
        (zeros.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(0.5)),
         r"1 of 6 values .* differ, by 0.5 at most, first at \[1, 2\]"),
    ):  # fmt: skip
        with pytest.raises(AssertionError, match=message):
            assert_same(zeros, other)


def test_a_state_names_the_weight_that_differs():
    state = {"weight": torch.ones(3), "bias": torch.zeros(3)}
    assert_same_state(state, dict(state))
    with pytest.raises(AssertionError, match="^bias: 3 of 3 values"):
        assert_same_state(state, state | {"bias": torch.ones(3)})


def test_pictures_are_compared_by_their_pixels(tmp_path: Path):
    for folder, value in (("a", 0), ("b", 9)):
        (tmp_path / folder).mkdir()
        iio.imwrite(tmp_path / folder / "x.png", np.full((4, 4, 3), value, np.uint8))
    assert_same_files(tmp_path / "a", tmp_path / "a")
    with pytest.raises(AssertionError, match="x.png: 48 of 48 values .* by 9 at most"):
        assert_same_files(tmp_path / "a", tmp_path / "b")


def test_bytes_are_shown_by_size_and_hash_also_inside_containers():
    assert shorten(["text", b"short", 1]) == ["text", b"short", 1]
    assert shorten({"file": (b"0" * 1000, 7)}) == {"file": ("<1000 bytes, sha256 c31bca45696e>", 7)}
    with pytest.raises(AssertionError) as failure:
        assert {"file": bytes(10**5)} == {"file": bytes(10**5 + 1)}
    assert len(str(failure.value)) < 300 and "<100000 bytes" in str(failure.value)

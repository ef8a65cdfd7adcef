"""What the kernels compute is tested with the operations that call them."""

import pytest

pytest.importorskip("numba")

from cbnerf.kernels import compiled


def test_kernels_compile_where_no_folder_can_be_written():
    space: dict = {}
    exec("def twice(x):\n    return 2 * x", space)  # numba finds no folder for it
    assert compiled("contract")(space["twice"])(21) == 42

"""What the kernels compute is tested in test_planes.py."""

import pytest

pytest.importorskip("numba")

from cbnerf.nerf.plane_kernels import compiled


def test_kernels_compile_where_no_folder_can_be_written():
    space: dict = {}
    exec("def twice(x):\n    return 2 * x", space)  # numba finds no folder for it
    assert compiled("contract")(space["twice"])(21) == 42

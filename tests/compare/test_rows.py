from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cbnerf.compare.protocols import WITHOUT_PHOTOGRAPH, Protocol
from cbnerf.compare.rows import enlarge, make_images, make_rows
from cbnerf.data.renders import Renders, save_renders
from cbnerf.data.scene import Scene, downsample
from cbnerf.presets import METHODS, RESOLUTIONS, preset
from cbnerf.training.stages import RENDERS_FILE

ALL = [
    "photograph bicubic", "nerf", "nerf bicubic", "nerf lanczos", "nerf-sr bicubic",
    "nerf-sr stage 1", "nerf-sr", "cb-nerf-paper", "vq-vae of cb-nerf-paper", "cb-nerf bicubic",
    "cb-nerf stage 1", "cb-nerf", "cnn", "linear",
]  # fmt: skip


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_all_methods_give_all_rows_and_shared_fields_one(resolution: str):
    methods = {name: preset(name, resolution) for name in METHODS}
    assert [row.name for row in make_rows(methods, "holdout")] == ALL
    assert [row.name for row in make_rows(methods, "table1")] == ALL


@pytest.mark.parametrize("protocol", WITHOUT_PHOTOGRAPH)
def test_without_a_photograph_there_is_no_reference_to_look_into(protocol: Protocol):
    rows = make_rows(METHODS, protocol)
    assert [row.name for row in rows] == [name for name in ALL if name != "nerf-sr"]


@pytest.mark.parametrize("method", ["cnn", "cb-nerf"])
def test_a_refiner_that_decodes_no_codes_is_not_bounded_by_them(method: str):
    names = [row.name for row in make_rows({method: METHODS[method]}, "holdout")]
    assert names == ["photograph bicubic", f"{method} bicubic", f"{method} stage 1", method]


@pytest.mark.parametrize("kernel", ["bicubic", "lanczos"])
def test_images_are_enlarged_as_pillow_does(kernel: str):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (6, 9, 3), generator=generator, dtype=torch.uint8)
    expected = Image.fromarray(image.numpy()).resize(
        (18, 12), {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}[kernel]
    )
    large = enlarge(image, 2, kernel)
    assert np.array_equal(large.numpy(), np.asarray(expected))
    flat = torch.full((4, 4, 3), 77, dtype=torch.uint8)
    assert torch.equal(enlarge(flat, 4, kernel), torch.full((16, 16, 3), 77, dtype=torch.uint8))


def test_the_low_res_render_of_a_super_sampled_field_is_the_mean_of_its_sub_pixels(
    tiny_scene: Scene, tiny_renders: Renders, tmp_path: Path
):
    save_renders(tiny_renders, tmp_path / RENDERS_FILE)
    config = METHODS["cb-nerf"]
    images = make_images(
        "bicubic", config, tiny_scene, [1], tmp_path, tmp_path, torch.device("cpu")
    )
    low_res = downsample(tiny_renders.rgb[[1]], tiny_scene.scale, "box")
    assert torch.equal(images[0], enlarge(low_res[0], tiny_scene.scale, "bicubic"))

"""Rows of a comparison: systems, and the images that each of them makes."""

from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from cbnerf.compare.protocols import WITHOUT_PHOTOGRAPH, Protocol
from cbnerf.config import Config, FieldConfig
from cbnerf.data.references import find_references
from cbnerf.data.renders import load_renders
from cbnerf.data.scene import Scene, downsample
from cbnerf.metrics import to_8bit
from cbnerf.training.checkpoint import FIELD_FILE, REFINER_FILE, Stage
from cbnerf.training.evaluation import refine_views, render_views, sr_views, unit_views
from cbnerf.training.field import low_res_cameras
from cbnerf.training.models import load_field, load_refiner
from cbnerf.training.stages import RENDERS_FILE

Part = Literal["photograph", "stage 1", "bicubic", "lanczos", "refined", "vq-vae"]
NO_SYSTEMS: tuple[Part, ...] = ("photograph", "vq-vae")
"""Images that are made of the photographs they are scored on."""

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}

_ABOUT: dict[Part, str] = {
    "photograph": "the low-res photograph itself, enlarged by a bicubic filter; not a system",
    "stage 1": "its stage-1 render at high resolution",
    "bicubic": "its low-res render, enlarged by a bicubic filter",
    "lanczos": "its low-res render, enlarged by a Lanczos filter",
    "refined": "its refined render",
    "vq-vae": "the photograph itself, decoded from its own codes: what its refiner can reach at "
    "best; not a system",
}


class Row(NamedTuple):
    name: str
    method: str
    part: Part

    @property
    def about(self) -> str:
        """The images of this row, in words."""
        about = _ABOUT[self.part]
        return about if self.part == "photograph" else f"{self.method}: {about}"

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The trained stages that its images need."""
        if self.part == "photograph":
            return ()
        return ("field", "refiner") if self.part in ("refined", "vq-vae") else ("field",)


def make_rows(methods: dict[str, Config], protocol: Protocol) -> list[Row]:
    """The rows of some methods; methods with the same stage 1 share its rows."""
    rows = [Row("photograph bicubic", next(iter(methods)), "photograph")]
    fields: list[FieldConfig] = []
    for method, config in methods.items():
        kind = config.refiner.kind
        if kind == "none":
            rows.append(Row(method, method, "stage 1"))
            rows += [Row(f"{method} {filter}", method, filter) for filter in ("bicubic", "lanczos")]
            continue
        if config.field not in fields:
            fields.append(config.field)
            rows.append(Row(f"{method} bicubic", method, "bicubic"))
            rows.append(Row(f"{method} stage 1", method, "stage 1"))
        if kind == "reference" and protocol in WITHOUT_PHOTOGRAPH:
            continue  # It needs a high-res photograph of the scene.
        rows.append(Row(method, method, "refined"))
        if kind == "paper":  # Codes of `residual` select filters and bound nothing.
            rows.append(Row(f"vq-vae of {method}", method, "vq-vae"))
    return rows


def make_images(
    part: Part,
    config: Config,
    scene: Scene,
    views: list[int],
    field: Path,
    refiner: Path,
    device: torch.device,
) -> UInt8[Tensor, "views height width 3"]:
    """Images of some views for a row; `field` and `refiner` are the folders of its stages."""
    if part == "photograph":
        low_res = scene.low_res(config.data.low_res_kernel, views)
        return torch.stack([enlarge(image, scene.scale, "bicubic") for image in low_res])
    if part in _RESAMPLING:
        low_res = _render_low_res(config, scene, views, field, device)
        return torch.stack([enlarge(image, scene.scale, part) for image in low_res])
    renders = load_renders(field / RENDERS_FILE)
    if part == "stage 1":
        return renders.rgb[views]
    model = load_refiner(refiner / REFINER_FILE, device)
    if part == "refined":
        references = find_references(config, scene, renders, views)
        return refine_views(model, renders.of(views), device, references)
    assert model.autoencoder is not None
    pairs = zip(
        sr_views(renders.of(views), device), unit_views(scene.images[views], device), strict=True
    )
    reconstructed = [model.autoencoder.reconstruct(*pair) for pair in pairs]
    return to_8bit(torch.cat(reconstructed)).movedim(1, -1).cpu()


def _render_low_res(
    config: Config, scene: Scene, views: list[int], field: Path, device: torch.device
) -> UInt8[Tensor, "views low_height low_width 3"]:
    """Low-res renders: with super-sampling the means of sub-pixels, as in training."""
    if config.field.super_sampling:
        return downsample(load_renders(field / RENDERS_FILE).rgb[views], scene.scale, "box")
    model, cameras, _ = load_field(field / FIELD_FILE, device)
    return render_views(model, low_res_cameras(cameras, scene.scale), views, 1).rgb


def enlarge(
    image: UInt8[Tensor, "height width 3"], scale: int, kernel: str
) -> UInt8[Tensor, "large_height large_width 3"]:
    """An image enlarged by Pillow with a `bicubic` or `lanczos` filter."""
    size = (image.shape[1] * scale, image.shape[0] * scale)
    resized = Image.fromarray(image.numpy()).resize(size, _RESAMPLING[kernel])
    return torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(
        size[1], size[0], 3
    )

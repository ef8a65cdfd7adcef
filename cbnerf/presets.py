"""Presets: a method at a resolution."""

from dataclasses import replace
from typing import Any

from cbnerf.config import (
    CodebookConfig,
    Config,
    FieldConfig,
    LossConfig,
    OptimConfig,
    RefinerConfig,
)
from cbnerf.overrides import with_overrides

_MLP_FIELD = FieldConfig(
    kind="mlp",
    sub_rays=0,
    num_fine_samples=64,
    # NeRF-SR: 512 pixels a step, about 30 epochs of fern.
    optim=OptimConfig(passes=30.0, batch_size=512, lr=5e-4, lr_end=0.01),
)
_PAPER_REFINER = RefinerConfig(
    kind="paper",
    skips="hr",
    # Released code: constant lr, 1.56 M steps; 3 epochs (47 k steps of fern) in NeRF-SR's refiner.
    optim=OptimConfig(passes=2150.0, batch_size=32, lr=5e-4, lr_end=1.0, warmup_steps=0),
)
_REFERENCE_REFINER = replace(_PAPER_REFINER, kind="reference", channels=128)
_HEALTHY_CODEBOOK = CodebookConfig(
    dim=32, imitation="ce", kmeans_init=True, revive_below=0.05, position_weight=2.0
)

# Differs from the paper (10, 1, 1), whose weights draw the codes away from what the filters want.
_LIGHT_LOSSES = LossConfig(lambda_recon=0.01, lambda_vq=0.01, lambda_imitation=0.001)

METHODS: dict[str, Config] = {
    "nerf": Config(
        field=replace(_MLP_FIELD, super_sampling=False), refiner=RefinerConfig(kind="none")
    ),
    "nerf-sr": Config(field=_MLP_FIELD, refiner=_REFERENCE_REFINER),
    "cb-nerf-paper": Config(
        field=_MLP_FIELD, codebook=CodebookConfig(imitation="vq"), refiner=_PAPER_REFINER
    ),
    "cb-nerf": Config(codebook=_HEALTHY_CODEBOOK, loss=_LIGHT_LOSSES),
    "cnn": Config(refiner=RefinerConfig(kind="cnn")),
    "linear": Config(refiner=RefinerConfig(kind="linear")),
}
"""Complete configurations by the name of their method (DESIGN.md, section 4)."""

_CPU_SIZE = {
    "field.num_coarse_samples": 32,
    "field.num_fine_samples": 24,
    "field.optim.batch_size": 512,
    "refiner.channels": 24,
    "refiner.blocks": 3,
    "refiner.patch_size": 32,
    "refiner.optim.batch_size": 8,
}
_LARGE_ON_CPU = _CPU_SIZE | {
    # The cost of a step that does not depend on the batch grows with the planes.
    "field.optim.batch_size": 2048, "field.optim.passes": 4.0, "refiner.optim.passes": 4.0,
}  # fmt: skip
RESOLUTIONS: dict[str, dict[str, Any]] = {
    "x2-504": {"data.width": 504},
    "x2-504-cpu": _LARGE_ON_CPU | {"data.width": 504},
    "x2-1008": {"data.width": 1008},
    "x2-1008-cpu": _LARGE_ON_CPU | {"data.width": 1008},
    "x4-1008": {"data.width": 1008, "data.scale": 4},
    "x4-1008-cpu": _LARGE_ON_CPU | {"data.width": 1008, "data.scale": 4},
    "x2-252": _CPU_SIZE | {
        "data.width": 252, "field.optim.passes": 7.2, "refiner.optim.passes": 19.2,
    },
    "x2-128": _CPU_SIZE | {
        "data.width": 128, "field.num_fine_samples": 16, "field.optim.passes": 6.11,
        # Few steps need a high learning rate.
        "field.planes.grid_lr": 3.0,
        # The filters, which contribute most, are solved before the first step.
        "refiner.optim.passes": 1.67, "refiner.optim.batch_size": 4,
        "refiner.optim.evaluations": 1,
    },
    "tiny": _CPU_SIZE | {
        "data.width": 64, "field.num_fine_samples": 16, "field.optim.steps": 20,
        "field.optim.batch_size": 64,
        "field.planes.hidden": 16, "field.planes.depth_steps": 4, "field.mlp.width": 32,
        "refiner.optim.steps": 10, "refiner.optim.batch_size": 2, "refiner.optim.evaluations": 2,
        "refiner.channels": 8, "codebook.size": 64,
    },
}  # fmt: skip
"""Overrides by name: image size and, below 504 pixels and in `-cpu`, a schedule for CPUs."""

_PUBLISHED_CPU_SIZE = {
    "field.optim.batch_size": 128,
    # A render with the MLP takes as long as twenty training steps.
    "field.optim.evaluations": 2,
}
_PUBLISHED: dict[str, dict[str, Any]] = {
    "x2-1008": {"refiner.optim.passes": 540.0},
    # NeRF-SR: 2048 rays per step at both scales.
    "x4-1008": {"field.optim.batch_size": 128, "refiner.optim.passes": 540.0},
    "x2-252": _PUBLISHED_CPU_SIZE | {"field.optim.passes": 7.2, "refiner.optim.passes": 192.0},
    "x2-128": _PUBLISHED_CPU_SIZE | {
        "field.optim.passes": 9.26, "refiner.optim.passes": 55.6, "refiner.optim.evaluations": 4,
    },
}  # fmt: skip
"""Further overrides of the methods with NeRF's MLP. At CPU sizes they train with more
and smaller updates: the schedules of the other methods are far too short for them."""


DEFAULT_METHOD = "cb-nerf"
DEFAULT_RESOLUTION = "x2-504"


def preset(method: str, resolution: str = DEFAULT_RESOLUTION) -> Config:
    """The configuration of a method at a resolution."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    if resolution not in RESOLUTIONS:
        raise ValueError(f"unknown resolution {resolution!r}; choose from {', '.join(RESOLUTIONS)}")
    published = _PUBLISHED.get(resolution, {}) if METHODS[method].field.kind == "mlp" else {}
    return with_overrides(METHODS[method], RESOLUTIONS[resolution] | published)


def choose_resolution(resolution: str | None, *, has_gpu: bool) -> str:
    """The resolution, by default x2-504 with a GPU and else x2-128; without a GPU with its schedule
    for CPUs where there is one: `x2-504-cpu`."""
    if resolution is None:
        return "x2-504" if has_gpu else "x2-128"
    on_cpu = f"{resolution}-cpu"
    return on_cpu if on_cpu in RESOLUTIONS and not has_gpu else resolution

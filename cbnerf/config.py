"""Every knob of cbnerf, as frozen dataclasses with checks.

A knob has one name everywhere: `codebook.size` is the field `Config.codebook.size`, the flag
`--codebook.size`, the key in a search space, the Optuna parameter and the MLflow parameter.
Imports no torch, so that checking a YAML file is instant.
"""

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

from cbnerf.strict_yaml import MOST, shown


class KnobError(ValueError):
    """A knob has a value of the right type that is not allowed, alone or with the other knobs."""


def _check(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise KnobError(f"{name} = {shown(value)} must be {rule}")


def _check_least(least: int, prefix: str, knobs: object, *names: str) -> None:
    for name in names:
        value = getattr(knobs, name)
        _check(value >= least, f"{prefix}.{name}", value, f"at least {least}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Adam with a linear warm-up and a cosine decay."""

    passes: float
    """How often a training pixel is seen on average; the number of steps follows from the scene."""
    steps: int = 0
    """Optimiser updates, in place of `passes`; 0 counts in passes."""
    batch_size: int
    """Low-res pixels (field) or patches (refiner) per update, summed over all processes."""
    lr: float
    """Learning rate after the warm-up."""
    lr_end: float = 0.03
    """Learning rate at the last step, as a fraction of `lr`."""
    warmup_steps: int = 20
    """Steps of linear warm-up from zero."""
    evaluations: int = 4
    """Number of evaluations of the validation views; each writes a checkpoint."""

    def check(self, stage: str) -> None:
        """Check the knobs of the optimiser of `stage`, `field` or `refiner`."""
        _check_least(0, f"{stage}.optim", self, "steps", "warmup_steps")
        _check_least(1, f"{stage}.optim", self, "batch_size", "evaluations")
        for name, value in {"passes": self.passes, "lr": self.lr}.items():
            _check(value > 0, f"{stage}.optim.{name}", value, "positive")
        _check(0 <= self.lr_end <= 1, f"{stage}.optim.lr_end", self.lr_end, "in [0, 1]")

    def num_steps(self, num_items: float) -> int:
        """Optimiser updates on this many low-res pixels (field) or patches (refiner)."""
        return self.steps or max(round(self.passes * num_items / self.batch_size), 1)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Resolution and split of a scene."""

    width: int = 504
    """Width of the high-res images in pixels; the photographs determine the height."""
    scale: int = 2
    """High-res over low-res pixels per side."""
    low_res_kernel: Literal["box", "lanczos"] = "box"
    """Downsampling of high-res images; NeRF-SR's code uses `lanczos`."""
    test_every: int = 8
    """Every n-th view from index 0 is a test view; 0, without `validation`, trains on all views
    (protocol `table1`)."""
    validation: bool = True
    """Hold out the views half-way between the test views for validation."""

    def __post_init__(self):
        _check(self.scale >= 1, "data.scale", self.scale, "at least 1")
        _check(self.width >= 8 * self.scale, "data.width", self.width, "at least 8 * data.scale")
        smallest = 3 if self.validation else 2  # with fewer, no view is left to train on
        allowed = self.test_every >= smallest or (self.test_every == 0 and not self.validation)
        rule = f"at least {smallest}, or 0 with data.validation = false"
        _check(allowed, "data.test_every", self.test_every, rule)


@dataclass(frozen=True, kw_only=True)
class PlanesConfig:
    """Factorised feature planes in NDC (TensoRF, K-Planes)."""

    channels: int = 16
    """Features of each plane."""
    cells_per_pixel: float = 1.0
    """Cells of the finest planes per high-res pixel, at infinity."""
    depth_cells: int = 96
    """Cells of the finest planes along depth."""
    depth_steps: int = 40
    """Steps of each of two short trainings that find depths with content; 0 trusts the bounds."""
    scales: tuple[int, ...] = (1, 4)
    """Cell sizes: each entry n adds three planes with cells n times as large."""
    levels: int = 3
    """A plane is the sum of this many grids, each at half the resolution of the previous one."""
    hidden: int = 64
    """Width of the two small MLPs behind the planes."""
    grid_lr: float = 1.0
    """Learning rate of the planes as a multiple of `field.optim.lr`."""
    network_lr: float = 0.3
    """Learning rate of the MLPs behind them as a multiple of `field.optim.lr`."""
    tv_weight: float = 1e-2
    """Weight of the total variation of the planes."""

    def __post_init__(self):
        _check_least(1, "field.planes", self, "channels", "depth_cells", "levels", "hidden")
        _check_least(0, "field.planes", self, "depth_steps", "tv_weight")
        for name in ("cells_per_pixel", "grid_lr", "network_lr"):
            _check(getattr(self, name) > 0, f"field.planes.{name}", getattr(self, name), "> 0")
        is_right = len(self.scales) > 0 and min(self.scales) >= 1
        _check(is_right, "field.planes.scales", self.scales, "a list of integers >= 1")


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """The network of NeRF; the coarse and the fine pass have one each."""

    width: int = 256
    """Units of a layer."""
    depth: int = 8
    """Layers before the density head; a skip connection feeds the input into the middle one."""
    position_frequencies: int = 10
    """Octaves of the positional encoding."""
    direction_frequencies: int = 4
    """Octaves of the encoding of directions."""
    density_noise: float = 1.0
    """Standard deviation of the noise added to raw densities in training."""

    def __post_init__(self):
        _check_least(2, "field.mlp", self, "width", "depth")
        octaves = "position_frequencies", "direction_frequencies"
        _check_least(0, "field.mlp", self, *octaves, "density_noise")


@dataclass(frozen=True, kw_only=True)
class FieldConfig:
    """Stage 1: a radiance field trained on low-res photographs only."""

    kind: Literal["planes", "mlp"] = "planes"
    """`planes` is fast; `mlp` is the coarse and fine network of NeRF and NeRF-SR."""
    super_sampling: bool = True
    """Supervise the mean of scale x scale sub-pixel rays (NeRF-SR) instead of one ray per pixel."""
    sub_rays: int = 2
    """Sub-pixel rays drawn per pixel and step; 0 means all scale x scale."""
    opposite_sub_rays: bool = True
    """Draw sub-pixel rays in pairs symmetric about the pixel centre, which cancels a linear colour
    gradient."""
    num_coarse_samples: int = 64
    """Samples per ray of the first pass: coarse network or proposal."""
    num_fine_samples: int = 32
    """Samples per ray of the second pass; the fine network also gets the coarse ones."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the networks' matrix products; positions, densities and sums stay float32.
    `auto` is bfloat16 on devices with instructions for it, else float32; $CBNERF_AUTO_PRECISION
    overrides it."""
    planes: PlanesConfig = PlanesConfig()
    mlp: MLPConfig = MLPConfig()
    optim: OptimConfig = OptimConfig(passes=57.0, batch_size=4096, lr=4e-2)

    def __post_init__(self):
        self.optim.check("field")
        _check_least(0, "field", self, "sub_rays")
        _check_least(4, "field", self, "num_coarse_samples", "num_fine_samples")


FSQ_LEVELS: dict[int, tuple[int, ...]] = {
    64: (8, 8), 256: (8, 6, 5), 512: (8, 8, 8), 1024: (8, 5, 5, 5), 2048: (8, 8, 6, 5),
    4096: (7, 5, 5, 5, 5), 8192: (8, 8, 5, 5, 5), 16384: (8, 8, 8, 6, 5), 65536: (8, 8, 8, 5, 5, 5),
}  # fmt: skip
"""Levels of `codebook.kind=fsq` by nominal size: 64 and 512 are exact, 256, 1024, 4096, 16384 and
65536 rounded as in table 1 of the FSQ paper, 2048 and 8192 rounded by the same rules."""


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """The codebook of stage 2 and how it learns."""

    kind: Literal["vq", "fsq"] = "vq"
    """`vq` learns its codes; `fsq` rounds each dimension to fixed levels and uses only the knobs
    `size` and `imitation`."""
    size: int = 1024
    """Number of codes, k in the paper; `fsq` has 64, 240, 512, 1000, 1920, 4375, 8000, 15360 or
    64000 for 64, 256, 512, 1024, 2048, 4096, 8192, 16384 or 65536, and refuses other sizes."""
    dim: int = 64
    """Dimension of a code; `fsq` has as many as it has levels."""
    beta: float = 0.25
    """Weight of the commitment loss (of the codebook loss with `vq_loss=released`)."""
    vq_loss: Literal["paper", "released"] = "paper"
    """Beta weighs the commitment loss (`paper`) or the codebook loss (`released` code)."""
    imitation: Literal["vq", "feature", "ce"] = "feature"
    """Target of the SR latents: `vq` their own nearest codes (paper), `feature` the HR code of the
    same place, `ce` the index of that code (cross-entropy)."""
    normalize: bool = False
    """Project latents and codes onto the unit sphere."""
    ema: bool = False
    """Update codes by exponential moving averages (EMA) instead of gradients."""
    ema_decay: float = 0.99
    """Decay of the averages."""
    kmeans_init: bool = False
    """Initialise by k-means over latents of the training photographs, not by normal noise."""
    revive_below: float = 0.0
    """Replace codes whose average number of uses per step falls below this; 0 disables it."""
    position_weight: float = 0.0
    """How far positions of pixels in the scene spread in latents, relative to features; 0 leaves
    positions out. `vq` with the `residual` refiner only."""
    shared: bool = False
    """Train one refiner with one codebook on all scenes, instead of one per scene."""

    def __post_init__(self):
        _check_least(2, "codebook", self, "size")
        _check_least(1, "codebook", self, "dim")
        _check_least(0, "codebook", self, "beta", "revive_below", "position_weight")
        _check(0 < self.ema_decay < 1, "codebook.ema_decay", self.ema_decay, "in (0, 1)")
        if self.kind == "fsq":
            sizes = ", ".join(map(str, FSQ_LEVELS))
            _check(self.size in FSQ_LEVELS, "codebook.size", self.size, f"one of {sizes} with fsq")
            # With `vq`, only the VQ loss ties latents to the codebook, and fsq has none.
            _check(self.imitation != "vq", "codebook.imitation", "vq", "feature or ce with fsq")

    @property
    def levels(self) -> tuple[int, ...]:
        """Levels of each dimension with `fsq`."""
        return FSQ_LEVELS[self.size]

    @property
    def uses_positions(self) -> bool:
        """Whether latents hold the position of their pixel; finite scalars do not."""
        return self.kind == "vq" and self.position_weight > 0

    @property
    def feature_dim(self) -> int:
        """Dimension of the encoder's features."""
        return len(self.levels) if self.kind == "fsq" else self.dim

    @property
    def latent_dim(self) -> int:
        """Dimension of latents and codes: features, and three coordinates of the position."""
        return self.feature_dim + 3 * self.uses_positions


@dataclass(frozen=True, kw_only=True)
class RefinerConfig:
    """Stage 2: the network that sharpens stage-1 renders."""

    kind: Literal["residual", "cnn", "paper", "reference", "linear", "none"] = "residual"
    """`residual` corrects the render by the filters of its codes and a CNN, `cnn` by the CNN alone;
    `paper` is the published encoder-decoder; `reference` uses a high-res photograph (NeRF-SR);
    `linear` is a fitted 7x7 filter."""
    skips: Literal["hr", "sr", "mixed"] = "mixed"
    """Skips of the decoder of `paper` in training: from the codes of the HR patch (released code),
    of the SR patch, or alternating."""
    channels: int = 48
    """Channels of the CNN, and of the first scale of the reference refiner."""
    blocks: int = 4
    """Residual blocks of the CNN."""
    references: int = 8
    """Reference patches per render of the reference refiner."""
    neighbours: int = 4
    """Nearest codes whose filters `residual` combines per pixel; at most `codebook.size - 1`."""
    ridge: float = 10.0
    """Regularisation of the codes' filters in `residual`: number of pixels that the common filter
    counts for beside those of the code."""
    consistency: float = 10.0
    """Weight of the low-res reconstruction term of `residual` and `linear`, relative to the change
    of the refined pixels, for scenes without a high-res photograph; 0 disables it."""
    patch_size: int = 64
    """Side of a training patch in high-res pixels; a multiple of 4."""
    optim: OptimConfig = OptimConfig(passes=450.0, batch_size=32, lr=2e-3)

    def __post_init__(self):
        self.optim.check("refiner")
        name, size = "refiner.patch_size", self.patch_size
        _check(size >= 8 and size % 4 == 0, name, size, "a multiple of 4, at least 8")
        rule = "a multiple of 8 for the reference refiner"
        _check(self.kind != "reference" or size % 8 == 0, name, size, rule)
        _check_least(1, "refiner", self, "channels", "blocks", "references", "neighbours")
        _check(self.ridge > 0, "refiner.ridge", self.ridge, "positive")
        _check_least(0, "refiner", self, "consistency")

    @property
    def alternates(self) -> bool:
        """Whether odd and even rows of a batch differ; then each process needs an even number."""
        return self.kind == "paper" and self.skips == "mixed"


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the four losses of stage 2 (paper, section 2-4)."""

    lambda_refine: float = 1.0
    """L1 between refined and HR patch."""
    lambda_recon: float = 10.0
    """MSE between the autoencoder's reconstruction and the HR patch."""
    lambda_vq: float = 1.0
    """VQ loss of the HR patch."""
    lambda_imitation: float = 1.0
    """Imitation loss of the SR patch."""

    def __post_init__(self):
        _check_least(0, "loss", self, *(knob.name for knob in fields(self)))


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """All knobs as `{"codebook.size": 1024, ...}`, in the order of this file."""
    flat: dict[str, Any] = {}
    for knob in fields(config):
        value = getattr(config, knob.name)
        name = prefix + knob.name
        flat |= flatten(value, name + ".") if is_dataclass(value) else {name: value}
    return flat


@dataclass(frozen=True, kw_only=True)
class Config:
    """One configuration of both stages."""

    data: DataConfig = DataConfig()
    field: FieldConfig = FieldConfig()
    codebook: CodebookConfig = CodebookConfig()
    refiner: RefinerConfig = RefinerConfig()
    loss: LossConfig = LossConfig()
    seed: int = 0
    """Seed of all random numbers in training."""
    deterministic: bool = False
    """Use deterministic algorithms, so that training on a GPU is reproducible bit by bit (slower);
    on a CPU it is for a fixed number of threads."""

    def __post_init__(self):
        for name, value in flatten(self).items():
            if isinstance(value, int | float):
                # Compare first: isfinite cannot convert a huge int.
                is_small = abs(value) < MOST and math.isfinite(value)
                _check(is_small, name, value, "finite, < 2^63")
        # Random generators are seeded by the product of seed and step.
        _check(0 <= self.seed < 2**32, "seed", self.seed, "at least 0 and less than 2^32")
        kind, weight = self.refiner.kind, self.codebook.position_weight
        rule = "0 with refiner.kind = paper"
        _check(not weight or kind != "paper", "codebook.position_weight", weight, rule)
        can_share, rule = kind not in ("reference", "none"), f"false with refiner.kind = {kind}"
        _check(can_share or not self.codebook.shared, "codebook.shared", True, rule)

    def num_steps(self, stage: Literal["field", "refiner"], num_pixels: int) -> int:
        """Steps of a stage on training views with `num_pixels` high-res pixels in all."""
        if stage == "field":
            return self.field.optim.num_steps(num_pixels / self.data.scale**2)
        return self.refiner.optim.num_steps(num_pixels / self.refiner.patch_size**2)


FIELD_KNOBS = ("data.", "field.", "seed", "deterministic")
"""Prefixes of the knobs of stage 1."""


def flatten_field(config: Config) -> dict[str, Any]:
    """The knobs of stage 1."""
    return {name: v for name, v in flatten(config).items() if name.startswith(FIELD_KNOBS)}

"""Which configurations need at least as much memory as another one."""

from collections.abc import Iterable

from cbnerf.config import Config, flatten

SIZES = (
    "field.optim.batch_size", "field.num_coarse_samples", "field.num_fine_samples",
    "field.planes.channels", "field.planes.cells_per_pixel", "field.planes.depth_cells",
    "field.planes.levels", "field.planes.hidden", "field.mlp.width", "field.mlp.depth",
    "codebook.size", "codebook.dim", "refiner.channels", "refiner.blocks", "refiner.references",
    "refiner.neighbours", "refiner.patch_size", "refiner.optim.batch_size",
)  # fmt: skip
"""Knobs with which memory grows."""


def needs_as_much(config: Config, other: Config) -> bool:
    """Whether a configuration certainly needs at least the memory of another one.

    None of its `SIZES` is smaller, it has the same words, lists, and yes or no, and it computes
    whatever the other one computes: where a weight is 0, its loss is left out.
    """
    theirs = flatten(other)
    for name, own in flatten(config).items():
        if name in SIZES:
            is_enough = own >= theirs[name]
        elif isinstance(own, bool | str | tuple):
            is_enough = own == theirs[name]
        else:
            is_enough = bool(own) >= bool(theirs[name])
        if not is_enough:
            return False
    return True


def searched_sizes(space: Iterable[str]) -> list[str]:
    """The `SIZES` among the knobs of a space."""
    return [name for name in space if name in SIZES]

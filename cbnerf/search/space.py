"""Which knobs, with which values, a method can search."""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

from cbnerf.config import FIELD_KNOBS, Config, KnobError, flatten
from cbnerf.overrides import with_overrides
from cbnerf.search.spec import Choices, Range, SearchSpec


class _Idle(NamedTuple):
    """Knobs without effect if other knobs have certain values."""

    where: Mapping[str, Any]
    knobs: tuple[str, ...]
    """Prefixes of their names."""


_OF_FILTERS = ("refiner.neighbours", "refiner.ridge")
_OF_CODES = ("codebook.", "loss.", "refiner.skips", *_OF_FILTERS)
_OF_RESIDUAL = ("refiner.channels", "refiner.blocks", *_OF_FILTERS)
_IDLE = (
    _Idle({"refiner.kind": "linear"}, ("codebook.", "loss.", "refiner.")),
    _Idle({"refiner.kind": "reference"}, (*_OF_CODES, "refiner.blocks")),
    _Idle({"refiner.kind": "paper"}, (*_OF_RESIDUAL, "refiner.references")),
    _Idle({"refiner.kind": "residual"}, ("refiner.skips", "refiner.references")),
    _Idle({"refiner.kind": "cnn"}, (*_OF_CODES, "refiner.references")),
    _Idle(
        {"codebook.kind": "fsq"},
        (
            "codebook.dim", "codebook.beta", "codebook.vq_loss", "codebook.normalize",
            "codebook.ema", "codebook.kmeans_init", "codebook.revive_below", "loss.lambda_vq",
            "codebook.position_weight",
        ),
    ),
    _Idle({"codebook.ema": False, "codebook.revive_below": 0.0}, ("codebook.ema_decay",)),
    _Idle({"field.kind": "planes"}, ("field.mlp.",)),
    _Idle({"field.kind": "mlp"}, ("field.planes.",)),
    _Idle({"field.super_sampling": False}, ("field.sub_rays", "field.opposite_sub_rays")),
    _Idle({"field.sub_rays": 0}, ("field.opposite_sub_rays",)),
    # Used only by protocols of `cbnerf compare` without high-res photographs of the scene.
    _Idle({}, ("refiner.consistency",)),
    # These change the number of evaluations and bitwise reproducibility only.
    _Idle({}, ("field.optim.evaluations", "refiner.optim.evaluations", "deterministic")),
)  # fmt: skip

_CHECKED_TOGETHER = (
    "codebook.kind", "codebook.size", "codebook.imitation", "refiner.kind", "refiner.patch_size",
)  # fmt: skip


def check_space(base: Config, spec: SearchSpec) -> None:
    """Raise a `ValueError` that names the knob if a knob of the space cannot change the score, or
    if one of its values is not allowed in any configuration."""
    space = spec.space
    _check_patches(base, spec)
    if base.refiner.kind == "none":
        idle = [name for name in space if not name.startswith(FIELD_KNOBS)]
        if idle:
            raise ValueError(
                f"space: {idle[0]} is a knob of stage 2, and {spec.method} ends with stage 1; "
                "search knobs of `field` (tune_configs/stage1.yaml) or another method"
            )
    if "codebook.shared" in space:
        raise ValueError(
            "space: codebook.shared decides what is trained; set it under `fixed`, and search once "
            "with each value"
        )
    if "auto" in getattr(space.get("field.precision"), "choices", ()):
        raise ValueError(
            "space: field.precision: `auto` differs between machines; give bfloat16 and float32"
        )
    if "seed" in space:
        raise ValueError("space: seed would select by chance among equal configurations")
    if "none" in getattr(space.get("refiner.kind"), "choices", ()):
        raise ValueError("space: refiner.kind: `none` has no stage 2 that could be compared")
    for name, domain in space.items():
        if all(_is_idle(name, values) for values in _settings(base, spec)):
            raise ValueError(f"space: {name} changes nothing in {spec.method}")
        for value in _examples(domain):
            _check_value(base, spec, name, value)


def _settings(base: Config, spec: SearchSpec) -> Iterator[dict[str, Any]]:
    """All knobs, for each combination of the searched choices on which the effect of other knobs
    depends; None for a knob that is searched in a range."""
    deciding = {name for idle in _IDLE for name in idle.where} & set(spec.space)
    domains = {name: spec.space[name] for name in sorted(deciding)}
    choices = [getattr(domain, "choices", (None,)) for domain in domains.values()]
    for values in product(*choices):
        yield flatten(base) | dict(zip(domains, values, strict=True))


def _is_idle(name: str, values: Mapping[str, Any]) -> bool:
    return any(
        name.startswith(idle.knobs)
        and name not in idle.where
        and all(values[knob] == value for knob, value in idle.where.items())
        for idle in _IDLE
    )


def _examples(domain: Range | Choices) -> tuple[Any, ...]:
    """The choices, or the ends of a range and, for integers, its second value."""
    if isinstance(domain, Choices):
        return domain.choices
    second = domain.low + (domain.step or 1) if isinstance(domain.low, int) else domain.low
    return (domain.low, min(second, domain.high), domain.high)


def _check_value(base: Config, spec: SearchSpec, name: str, value: Any) -> None:
    """At least one combination of the knobs that are checked together must allow the value."""
    related = {
        knob: domain.choices
        for knob, domain in spec.space.items()
        if knob in _CHECKED_TOGETHER and knob != name and isinstance(domain, Choices)
    }
    trouble: KnobError | None = None
    for values in product(*related.values()):
        try:
            with_overrides(base, dict(zip(related, values, strict=True)) | {name: value})
        except KnobError as error:
            trouble = trouble or error
        else:
            return
    raise ValueError(f"space: {trouble}")


def _check_patches(base: Config, spec: SearchSpec) -> None:
    if base.refiner.kind in ("none", "linear"):
        return
    domain = spec.space.get("refiner.patch_size")
    side = max(_examples(domain)) if domain else base.refiner.patch_size
    if side > base.data.width:
        raise ValueError(
            f"refiner.patch_size = {side} does not fit into images {base.data.width} pixels wide"
        )

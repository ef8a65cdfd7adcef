"""Limits on what a configuration costs, which are known before it is trained."""

from collections.abc import Mapping
from typing import Any

from cbnerf.config import Config, KnobError, flatten
from cbnerf.overrides import with_overrides
from cbnerf.search.spec import Choices, SearchSpec, shown_knob
from cbnerf.training.models import count_parameters

_UNITS = {"parameters": "parameters", "codebook.size": "codes"}


def known_costs(base: Config, spec: SearchSpec, overrides: Mapping[str, Any]) -> dict[str, float]:
    """The costs of a configuration that objectives or limits name; KnobError if its knobs are
    incompatible."""
    config, named = with_overrides(base, overrides), {*spec.objectives, *spec.limits}
    return {name: _cost(config, name) for name in _UNITS if name in named}


def check_limits(base: Config, spec: SearchSpec, values: Mapping[str, Any]) -> None:
    """ValueError if a configuration with these values exceeds a limit whatever the other knobs of
    the space are."""
    for trouble in _excesses(base, spec, values):
        point = ", ".join(f"{knob} = {shown_knob(value)}" for knob, value in values.items())
        raise ValueError(f"{point} has {trouble}")


def is_within_limits(base: Config, spec: SearchSpec, values: Mapping[str, Any]) -> bool:
    """Whether a configuration with these values can keep within the limits."""
    return not _excesses(base, spec, values)


def check_costs(base: Config, spec: SearchSpec) -> None:
    """ValueError if costs of stage 2 are named without one, or a point to try first exceeds a
    limit."""
    for name in _UNITS:
        if base.refiner.kind == "none" and name in (*spec.objectives, *spec.limits):
            raise ValueError(f"{name} is a cost of stage 2, and {spec.method} ends with stage 1")
    for point in spec.initial:
        try:
            check_limits(base, spec, preset_point(base, spec) | point)
        except KnobError:  # The search records it as failed.
            continue
        except ValueError as error:
            raise ValueError(f"initial: {error}") from None


def preset_point(base: Config, spec: SearchSpec) -> dict[str, Any]:
    """The values of the preset that lie in the space."""
    return {
        name: value
        for name, value in flatten(base).items()
        if name in spec.space and value in spec.space[name]
    }


def _excesses(base: Config, spec: SearchSpec, values: Mapping[str, Any]) -> list[str]:
    """The limits that all configurations with these values exceed."""
    return [
        f"at least {least:.0f} {_UNITS[name]}, more than the study's limits: {name}: {limit:.0f}"
        for name, limit in spec.limits.items()
        if (least := _least_cost(base, spec, values, name)) > limit
    ]


def _least_cost(base: Config, spec: SearchSpec, values: Mapping[str, Any], name: str) -> float:
    """The lowest cost of a configuration with these values.

    Costs grow with every number, so one knob after the other takes the value that costs least.
    """
    least = _cost(best := with_overrides(base, values), name)
    for knob, domain in spec.space.items():
        if knob in values:
            continue
        costs = []
        for value in domain.choices if isinstance(domain, Choices) else (domain.low,):
            try:
                config = with_overrides(best, {knob: value})
            except KnobError:
                continue
            costs.append((_cost(config, name), config))
        if costs:
            least, best = min(costs, key=lambda pair: pair[0])
    return least


def _cost(config: Config, name: str) -> float:
    return float(config.codebook.size if name == "codebook.size" else count_parameters(config))

"""Search specifications: the YAML files of `tune_configs/`, checked against the knobs of `config`.

Everything is parsed into own types here, before Optuna or Ray see it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from cbnerf.config import Config
from cbnerf.overrides import cast, knob_type, with_overrides
from cbnerf.presets import METHODS, RESOLUTIONS
from cbnerf.strict_yaml import MOST, load_yaml, shown

MIN_GPU = 0.01
"""The smallest part of a GPU that a process may be given."""
Value = bool | int | float | str


@dataclass(frozen=True, kw_only=True)
class Range:
    """Values between two bounds, integer or real as the knob is; with `step` those of a grid that
    begins at `low`, whose last value `high` is."""

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    def __contains__(self, value: Any) -> bool:
        if not (_is_like(value, self.low) and self.low <= value <= self.high):
            return False
        steps = (value - self.low) / self.step if self.step else 0
        return abs(steps - round(steps)) < 1e-8  # as Optuna has it


@dataclass(frozen=True, kw_only=True)
class Choices:
    """One of a list of values."""

    choices: tuple[Value, ...]

    def __contains__(self, value: Any) -> bool:
        return any(_is_like(value, choice) and value == choice for choice in self.choices)


def _is_like(value: Any, of_knob: Value) -> bool:
    """Whether a value has the type of a knob's; to Python, True is 1, too."""
    return type(value) is type(of_knob)


Space = dict[str, Range | Choices]


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one training run gets."""

    workers: int = 1
    """Processes of one run; two and more train through Ray Train with DistributedDataParallel."""
    cpus_per_worker: int | float = 1
    gpus_per_worker: int | float | Literal["auto"] = "auto"
    """A whole GPU or, of a single worker, a part of one; `auto`: where the cluster has GPUs a whole
    one for each of several workers and for a single one the part that a few steps are measured to
    need (a quarter where that fails, and at least); none elsewhere."""

    def __post_init__(self):
        if self.workers < 1 or self.cpus_per_worker <= 0:
            raise ValueError("resources need at least 1 worker with some CPU")
        if self.gpus_per_worker != "auto":
            _check_gpus(self.gpus_per_worker, self.workers)


def _check_gpus(gpus: int | float, workers: int) -> None:
    """A process trains on one GPU; several share one only where they do not talk over NCCL, which
    refuses that."""
    given = f"resources.gpus_per_worker (--gpus) = {gpus}"
    if gpus != 0 and not MIN_GPU <= gpus <= 1:
        raise ValueError(
            f"{given} must be 0, 1 or a part of 1 (at least {MIN_GPU}): a process trains on one "
            "GPU; for more GPUs a training run give more resources.workers"
        )
    if workers > 1 and gpus not in (0, 1):
        raise ValueError(
            f"{given}, and resources.workers = {workers}: workers that train together need a whole "
            "GPU each; give 1, or 0 for none"
        )


Rule = Literal["race", "asha", "wilcoxon", "none"]
Sampler = Literal["sobol-tpe", "tpe", "random"]


@dataclass(frozen=True, kw_only=True)
class Stopping:
    """When a configuration is given up."""

    rule: Rule = "race"
    """`race` stops what is unlikely to beat the best, `asha` keeps the best 1 / `eta` of each rung,
    `wilcoxon` tests scenes of the top rung by signed ranks, `none` trains everything."""
    rungs: int = 3
    """Shares of a whole training at which configurations are judged, at most; 1 judges by scenes
    alone."""
    eta: int = 3
    """Ratio between the steps of a rung and of the one below."""
    grace_period: int = 100
    """Steps of the lowest rung, at least: fewer tell less than they and their evaluation cost."""
    threshold: float = 0.05
    """`race` stops below this probability of being better than the best finished configuration,
    `wilcoxon` below this p-value."""
    margin: float = 0.05
    """`race`: a lead below this does not count; in dB, and a thirtieth of it in SSIM. The default
    is what another seed makes of a configuration."""

    def __post_init__(self):
        if not (1 <= self.rungs <= 20 and 2 <= self.eta <= 1000):
            raise ValueError(
                "stopping.rungs must be at least 1 and at most 20, stopping.eta between 2 and 1000"
            )
        if self.grace_period < 1:
            raise ValueError("stopping.grace_period must be at least 1")
        if self.margin < 0:
            raise ValueError("stopping.margin must not be negative")
        if not 0 < self.threshold < 0.5:
            raise ValueError("stopping.threshold must lie between 0 and 0.5")


QUALITIES = ("val/psnr", "val/ssim")
"""What can be maximised, as a mean over scenes."""
COSTS = ("seconds", "parameters", "codebook.size")
"""What can be minimised: training seconds of stage 2 (stage 1 where that is searched), parameters
of stage 2 (of its networks, codes and filters), codes."""
LIMITED = ("parameters", "codebook.size")
"""What can have an upper bound."""
MOST_TRIALS = 100_000
"""More would not fit into the arrays that they are judged on."""


@dataclass(frozen=True, kw_only=True)
class SearchSpec:
    """What to search, by what measure, for how long."""

    method: str = "cb-nerf"
    resolution: str = "auto"
    """`auto`: x2-504 where the cluster has GPUs, x2-128 elsewhere."""
    objectives: tuple[str, ...] = ("val/psnr",)
    """Of QUALITIES and COSTS; several give a Pareto front. The first must be a quality."""
    limits: Mapping[str, float] = field(default_factory=dict)
    """Upper bounds on `parameters` or `codebook.size`; what exceeds one is not trained."""
    stopping: Stopping = Stopping()
    trials: int = 12
    """Configurations to try."""
    seed: int = 0
    """Of the sampler; training is seeded by the knob `seed`."""
    sampler: Sampler = "sobol-tpe"
    """`tpe` is Optuna's, which starts from independent draws; `sobol-tpe` starts from points that
    lie evenly in the space; `random` draws to the end."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Knobs that differ from the preset in every trial."""
    space: Space = field(default_factory=dict)
    initial: tuple[Mapping[str, Any], ...] = ()
    """Points to try first; the preset's own values stand in for knobs not named."""
    resources: Resources = Resources()

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method {shown(self.method)} is not one of {', '.join(METHODS)}")
        if self.resolution not in ("auto", *RESOLUTIONS):
            raise ValueError(
                f"resolution {shown(self.resolution)} is not one of auto, {', '.join(RESOLUTIONS)}"
            )
        for name in self.objectives:
            if name not in QUALITIES + COSTS:
                raise ValueError(
                    f"objective {shown(name)} is not one of {', '.join(QUALITIES + COSTS)}"
                )
        if not self.objectives or self.objectives[0] not in QUALITIES:
            raise ValueError(f"the first objective must be one of {', '.join(QUALITIES)}")
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError("objectives names one twice")
        for name, limit in self.limits.items():
            if name not in LIMITED or limit <= 0:
                raise ValueError(
                    f"limits: {shown(name)}: {limit} is not a positive bound on "
                    f"{' or '.join(LIMITED)}"
                )
        if not 1 <= self.trials <= MOST_TRIALS:
            raise ValueError(f"trials must be at least 1 and at most {MOST_TRIALS}")
        if not self.space:
            raise ValueError("space names no knob to search")
        both = sorted(set(self.space) & set(self.fixed))
        if both:
            raise ValueError(f"{both[0]} stands in both fixed and space")


def load_spec(path: Path) -> SearchSpec:
    """Read a search specification; any mistake is one `ValueError` that names the file."""
    content = load_yaml(path)
    try:
        return parse_spec(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_spec(content: Mapping[str, Any]) -> SearchSpec:
    """A specification from plain values, unknown names and wrong types refused."""
    values = dict(_known(SearchSpec, content, "the specification"))
    for name in ("method", "resolution"):
        if not isinstance(values.get(name, ""), str):
            raise ValueError(f"{name} = {shown(values[name])} is not a name")
    for name in ("trials", "seed"):
        if not _is_number(values.get(name, 0), int) or values.get(name, 0) < 0:
            raise ValueError(f"{name} = {shown(values[name])} is not a whole number")
    fixed = _mapping(values.get("fixed", {}), "fixed")
    values["fixed"] = {name: _value(name, value) for name, value in fixed.items()}
    space = _mapping(values.get("space", {}), "space")
    values["space"] = {name: _parse_domain(name, domain) for name, domain in space.items()}
    for name in values["space"]:
        if name.startswith("data."):
            raise ValueError(f"space: {name} decides what is scored, so scores would not compare")
    if values["fixed"].get("data.validation") is False:
        raise ValueError("fixed: data.validation must be true; a search selects on these views")
    initial = values.get("initial", [])
    if not isinstance(initial, list):
        raise ValueError("initial must be a list of `knob: value` mappings")
    values["initial"] = tuple(_parse_point(point, values["space"]) for point in initial)
    values["resources"] = _parse_resources(values.get("resources", {}))
    values["stopping"] = _parse_stopping(values.get("stopping", {}))
    _one_of("sampler", values.get("sampler", SearchSpec.sampler), Sampler)
    values["objectives"] = _parse_objectives(values.get("objectives", ["val/psnr"]))
    values["limits"] = _mapping(values.get("limits", {}), "limits")
    for name, limit in values["limits"].items():
        if not _is_number(limit, int | float):
            raise ValueError(f"limits: {shown(name)} = {shown(limit)} is not a number")
    values["limits"] = {name: float(limit) for name, limit in values["limits"].items()}
    return SearchSpec(**values)


def _parse_objectives(content: Any) -> tuple[str, ...]:
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"objectives must be a list of names, found {shown(content)}")
    return tuple(content)


def _parse_stopping(content: Any) -> Stopping:
    entries = _known(Stopping, content, "stopping")
    _one_of("stopping.rule", entries.get("rule", Stopping.rule), Rule)
    number = int | float
    kinds = {"rungs": int, "eta": int, "grace_period": int, "threshold": number, "margin": number}
    numbers = {name: entries[name] for name in kinds if name in entries}
    for name, value in numbers.items():
        if not _is_number(value, kinds[name]):
            raise ValueError(f"stopping.{name} = {shown(value)} is not a number of its kind")
        numbers[name] = value if kinds[name] is int else float(value)
    return Stopping(**entries | numbers)


def _one_of(name: str, value: Any, kind: Any) -> None:
    if value not in get_args(kind):
        raise ValueError(f"{name} = {shown(value)} is not one of {', '.join(get_args(kind))}")


def _parse_point(point: Any, space: Space) -> dict[str, Any]:
    parsed = {name: _value(name, value) for name, value in _mapping(point, "initial").items()}
    for name, value in parsed.items():
        if name not in space:
            raise ValueError(f"initial: {name} is not in the space")
        if value not in space[name]:
            raise ValueError(f"initial: {name} = {shown(value)} lies outside the space")
    return parsed


def _parse_domain(name: str, domain: Any) -> Range | Choices:
    kind = knob_type(name)
    if get_origin(kind) is tuple:
        raise ValueError(f"space: {name} is a list; only numbers, words and yes or no are searched")
    entries = _mapping(domain, f"space: {name}")
    if set(entries) == {"choices"}:
        choices = entries["choices"]
        if not isinstance(choices, list) or not choices:
            raise ValueError(f"space: {name}: choices must be a list of values")
        values = tuple(_value(name, choice) for choice in choices)
        twice = next((value for i, value in enumerate(values) if value in values[:i]), None)
        if twice is not None:
            raise ValueError(f"space: {name}: choices names {shown(twice)} twice")
        return Choices(choices=values)
    unknown = sorted(set(entries) - {"low", "high", "log", "step"})
    if unknown or not {"low", "high"} <= set(entries):
        raise ValueError(
            f"space: {name}: give `choices: [...]` or `low: ..., high: ...` with `log` or `step`"
        )
    if kind not in (int, float):
        raise ValueError(f"space: {name} is not a number; give `choices: [...]`")
    low, high = _value(name, entries["low"]), _value(name, entries["high"])
    log, step = entries.get("log", False), entries.get("step")
    if not isinstance(log, bool):
        raise ValueError(f"space: {name}: log = {shown(log)} is not true or false")
    if not low < high or (log and low <= 0):
        raise ValueError(f"space: {name}: needs {'0 < ' if log else ''}low < high")
    if step is not None:
        step = cast(name, step)
        if log or not 0 < step <= high - low:
            raise ValueError(
                f"space: {name}: step must be positive, at most high - low, and not go with log"
            )
        high = _last_of_grid(name, low, high, step)
    return Range(low=low, high=high, log=log, step=step)


def _last_of_grid(name: str, low: Any, high: Any, step: Any) -> Any:
    """The last value of low, low + step, ... up to `high`; in decimals, as Optuna has it, where 0.3
    is three steps of 0.1."""
    first, width = Decimal(str(low)), Decimal(str(step))
    last = first + (Decimal(str(high)) - first) // width * width
    found = type(low)(last)
    if Decimal(str(found)) != last:
        raise ValueError(f"space: {name}: low and step have too many digits for a grid; round them")
    return found


def _known(record: type, content: Any, where: str) -> dict[str, Any]:
    entries = _mapping(content, where)
    names = [knob.name for knob in fields(record)]
    for name in entries:
        if name not in names:
            raise ValueError(f"unknown key {shown(name)} in {where}; known: {', '.join(names)}")
    return entries


def _parse_resources(content: Any) -> Resources:
    entries = _known(Resources, content, "resources")
    for name, value in entries.items():
        kind = int if name == "workers" else int | float
        is_auto = name == "gpus_per_worker" and value == "auto"
        if not is_auto and not _is_number(value, kind):
            number = "a whole number" if kind is int else "a number"
            raise ValueError(f"resources.{name} = {shown(value)} is not {number}")
    return Resources(**entries)


def _value(name: str, value: Any) -> Any:
    """A value for a knob, of the knob's type and within its limits."""
    value = cast(name, value)
    with_overrides(Config(), {name: value})
    return value


def _is_number(value: Any, kind: Any) -> bool:
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    return abs(value) < MOST  # and neither infinite nor NaN


def _mapping(content: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{where}: expected `name: value` entries, found {shown(content)}")
    return content

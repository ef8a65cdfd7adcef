"""Search specifications: the YAML files of `tune_configs/`, parsed by pydantic into frozen records.

Names and values of knobs are checked against `config`. Optuna and Ray see only these records.
"""

from collections.abc import Mapping
from dataclasses import field, fields
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails

from cbnerf.config import Config
from cbnerf.overrides import cast, knob_type, with_overrides
from cbnerf.presets import METHODS, RESOLUTIONS
from cbnerf.strict_yaml import MOST, load_yaml, shown

Rule = Literal["race", "none"]
Sampler = Literal["sobol-tpe", "tpe", "random"]
Quality = Literal["val/psnr", "val/ssim"]
Cost = Literal["seconds", "parameters", "codebook.size"]
QUALITIES: tuple[str, ...] = get_args(Quality)
UNITS = {"val/psnr": "dB", "val/ssim": "SSIM"}
MOST_TRIALS = 100_000
"""Maximum length of the arrays of the race."""
MIN_GPU = 0.01
"""Smallest share of a GPU for a process."""

Whole = Annotated[int, Field(strict=True, ge=0, le=MOST - 1)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=-MOST, lt=MOST)]
Bound = Annotated[Number, Field(gt=0)]
_STRICT = ConfigDict(extra="forbid")


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise ValueError(rule)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Range:
    """Values between two bounds, integer or real as the knob is; with `step` the grid `low`,
    `low + step`, ..., whose last value is `high`."""

    low: Any
    high: Any
    log: Annotated[bool, Field(strict=True)] = False
    step: Any = None

    def __contains__(self, value: Any) -> bool:
        if not (type(value) is type(self.low) and self.low <= value <= self.high):
            return False
        steps = (value - self.low) / self.step if self.step else 0
        return abs(steps - round(steps)) < 1e-8  # Optuna's tolerance


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Choices:
    """One of a list of values."""

    choices: Annotated[tuple[Any, ...], Field(min_length=1)]

    def __contains__(self, value: Any) -> bool:
        # In Python True == 1.
        return any(type(value) is type(choice) and value == choice for choice in self.choices)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Resources:
    """Resources of one training run."""

    workers: Whole | tuple[Whole, Whole] = 1
    """Processes of one run; two and more train through Ray Train with DistributedDataParallel.
    `[1, 4]` is an elastic group: as many of one to four as there is room for, which changes when
    machines leave and join."""
    cpus_per_worker: Number = 1
    gpus_per_worker: Number | Literal["auto"] = "auto"
    """A whole GPU or, for a single worker, a share of one. `auto` on a cluster with GPUs: one for
    each of several workers; for a single worker the share that a few steps are measured to need, a
    quarter at least and where that fails. Without GPUs: 0."""

    def __post_init__(self):
        gpus = self.gpus_per_worker
        enough = self.min_workers >= 1 and self.cpus_per_worker > 0
        _require(enough, "resources need at least 1 worker with some CPU")
        rises = not self.is_elastic or self.min_workers < self.max_workers
        _require(rises, "resources.workers: [least, most] needs least < most")
        if gpus == "auto":
            return
        given = f"resources.gpus_per_worker (--gpus) = {gpus:g}"
        _require(
            gpus == 0 or MIN_GPU <= gpus <= 1,
            f"{given} must be 0, 1 or a part of 1 (at least {MIN_GPU}): a process trains on one "
            "GPU; for more GPUs a training run give more resources.workers",
        )
        _require(
            not self.together or gpus in (0, 1),  # NCCL refuses two processes on one GPU.
            f"{given}, and resources.workers = {self.shown_workers}: workers that train together "
            "need a whole GPU each; give 1, or 0 for none",
        )

    @property
    def is_elastic(self) -> bool:
        return isinstance(self.workers, tuple)

    @property
    def min_workers(self) -> int:
        return self.workers[0] if isinstance(self.workers, tuple) else self.workers

    @property
    def max_workers(self) -> int:
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers

    @property
    def together(self) -> bool:
        """Whether a run is a group of processes, which train through Ray Train."""
        return self.max_workers > 1

    @property
    def shown_workers(self) -> str:
        """`workers` as a specification writes them."""
        return str(list(self.workers)) if isinstance(self.workers, tuple) else str(self.workers)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Stopping:
    """When a configuration is pruned."""

    rule: Rule = "race"
    """`race` prunes what is unlikely to beat the incumbent, `none` trains everything."""
    rungs: Whole = 3
    """Maximum number of rungs, the last being a whole training; 1 compares by scenes alone."""
    eta: Whole = 3
    """Ratio between the steps of a rung and of the one below."""
    grace_period: Whole = 100
    """Minimum steps of the lowest rung; with fewer, a rung costs more than it reveals."""
    threshold: Number = 0.05
    """A configuration is pruned below this probability of beating the incumbent."""
    margin: Number = 0.05
    """A lead below this does not count; in dB, and a thirtieth of it in SSIM. The default
    is about the seed-to-seed spread."""

    def __post_init__(self):
        _require(
            1 <= self.rungs <= 20 and 2 <= self.eta <= 1000,
            "stopping.rungs must be at least 1 and at most 20, stopping.eta between 2 and 1000",
        )
        _require(self.grace_period >= 1, "stopping.grace_period must be at least 1")
        _require(self.margin >= 0, "stopping.margin must not be negative")
        _require(0 < self.threshold < 0.5, "stopping.threshold must lie between 0 and 0.5")

    def margin_of(self, quality: str) -> float:
        """The margin in units of a quality."""
        return self.margin if quality == "val/psnr" else self.margin / 30


def _value(name: str, value: Any) -> Any:
    """A value of a knob, of its type and within its limits."""
    value = cast(name, value)
    with_overrides(Config(), {name: value})
    return value


def _domain(name: str, domain: Range | Choices) -> Range | Choices:
    """A domain of a knob, its values checked by `_value`."""
    kind, where = knob_type(name), f"space: {name}"
    is_list = get_origin(kind) is tuple
    _require(not is_list, f"{where} is a list; only numbers, words and yes or no are searched")
    if isinstance(domain, Choices):
        values = tuple(_value(name, choice) for choice in domain.choices)
        for index, value in enumerate(values):
            _require(value not in values[:index], f"{where}: choices names {shown(value)} twice")
        return Choices(choices=values)
    _require(kind in (int, float), f"{where} is not a number; give `choices: [...]`")
    low, high, log = _value(name, domain.low), _value(name, domain.high), domain.log
    is_right = low < high and (low > 0 or not log)
    _require(is_right, f"{where}: needs {'0 < ' if log else ''}low < high")
    if domain.step is None:
        return Range(low=low, high=high, log=log)
    step = cast(name, domain.step)
    _require(
        not log and 0 < step <= high - low,
        f"{where}: step must be positive, at most high - low, and not go with log",
    )
    # In decimals, as in Optuna: 0.3 is three steps of 0.1.
    first, width = Decimal(str(low)), Decimal(str(step))
    last = first + (Decimal(str(high)) - first) // width * width
    is_exact = Decimal(str(kind(last))) == last
    _require(is_exact, f"{where}: low and step have too many digits for a grid; round them")
    return Range(low=low, high=kind(last), step=step)


Knob = Annotated[str, AfterValidator(lambda name: knob_type(name) and name)]
Point = Annotated[dict[str, Any], AfterValidator(lambda p: {k: _value(k, v) for k, v in p.items()})]
Space = Annotated[
    dict[Knob, Choices | Range],
    AfterValidator(lambda space: {name: _domain(name, domain) for name, domain in space.items()}),
]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SearchSpec:
    """What to search, by what measure, for how long."""

    method: str = "cb-nerf"
    resolution: str = "auto"
    """`auto`: x2-504 where the cluster has GPUs, x2-128 elsewhere."""
    objectives: tuple[Literal[Quality, Cost], ...] = ("val/psnr",)
    """Qualities, means over scenes, are maximised; costs are minimised: training seconds of stage 2
    (stage 1 where that is searched), parameters of stage 2 (of its networks, codes and filters),
    codes. Several give a Pareto front. The first must be a quality."""
    limits: dict[Literal["parameters", "codebook.size"], Bound] = field(default_factory=dict)
    """Upper bounds; a configuration that exceeds one is not trained."""
    stopping: Stopping = Stopping()
    trials: Whole = 12
    """Configurations to try."""
    seed: Whole = 0
    """Seed of the sampler; training is seeded by the knob `seed`."""
    sampler: Sampler = "sobol-tpe"
    """`tpe` is Optuna's with its random start, `sobol-tpe` has a quasi-random start, `random` does
    not learn."""
    fixed: Point = field(default_factory=dict)
    """Knobs that differ from the preset in every configuration."""
    space: Space = field(default_factory=dict)
    initial: tuple[Point, ...] = ()
    """Points to try first; knobs that are not named keep the preset's values."""
    resources: Resources = Resources()

    def __post_init__(self):
        for name, known in (("method", METHODS), ("resolution", ("auto", *RESOLUTIONS))):
            value = getattr(self, name)
            _require(value in known, f"{name} {shown(value)} is not one of {', '.join(known)}")
        first_is_quality = self.objectives[:1] in [(name,) for name in QUALITIES]
        _require(first_is_quality, f"the first objective must be one of {', '.join(QUALITIES)}")
        once = len(set(self.objectives)) == len(self.objectives)
        _require(once, "objectives names one twice")
        few = 1 <= self.trials <= MOST_TRIALS
        _require(few, f"trials must be at least 1 and at most {MOST_TRIALS}")
        _require(bool(self.space), "space names no knob to search")
        for name in self.space:
            _require(name not in self.fixed, f"{name} is in both fixed and space")
            decides = name.startswith("data.")
            _require(
                not decides, f"space: {name} decides what is scored, so scores would not compare"
            )
        _require(
            self.fixed.get("data.validation") is not False,
            "fixed: data.validation must be true; a search selects on these views",
        )
        for name, value in (knob for point in self.initial for knob in point.items()):
            _require(name in self.space, f"initial: {name} is not in the space")
            lies_in = value in self.space[name]
            _require(lies_in, f"initial: {name} = {shown(value)} lies outside the space")


def with_unit(value: float, quality: str) -> str:
    """A difference of a quality, with its unit."""
    return f"{value:.{3 if quality == 'val/psnr' else 4}f} {UNITS[quality]}"


def shown_knob(value: object) -> str:
    """A value of a knob, a real one with three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def load_spec(path: Path) -> SearchSpec:
    """Read a search specification; a mistake is a `ValueError` of one line that names the file."""
    content = load_yaml(path)
    try:
        return parse_spec(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_spec(content: Mapping[str, Any]) -> SearchSpec:
    """A specification from plain values; a mistake is a `ValueError` of one line."""
    try:
        return TypeAdapter(SearchSpec).validate_python(content)
    except ValidationError as error:
        # A mistake inside a `Range` or `Choices` is more specific than that the other does not fit.
        mistake = min(error.errors(), key=lambda mistake: mistake["type"] in _UNFIT)
        raise ValueError(_explain(mistake)) from None


def _explain(mistake: ErrorDetails) -> str:
    """One line on a mistake that pydantic has found."""
    kind, path, found = mistake["type"], mistake["loc"], shown(mistake["input"])
    context = mistake.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if path[0] == "space" and kind in _UNFIT:
        return (
            f"space: {path[1]}: give `choices: [...]` or `low: ..., high: ...` with `log` or `step`"
        )
    if kind == "unexpected_keyword_argument":
        record, where = _RECORDS.get(str(path[0]), SearchSpec), ".".join(map(str, path[:-1]))
        known = ", ".join(knob.name for knob in fields(record))
        return f"unknown key {shown(path[-1])} in {where or 'the specification'}; known: {known}"
    # A third part is the member of a union that pydantic has tried, or `[key]`.
    where = ".".join(map(str, path[:2] + path[3:]))
    if kind in ("dict_type", "dataclass_type"):
        return f"{where}: expected `name: value` entries, found {found}"
    if kind in ("tuple_type", "too_short"):
        return f"{where} must be a list of {_LISTS.get(where, 'values')}, found {found}"
    expected = _EXPECTED.get(kind, "a number")
    if where == "resources.workers":
        expected = "a whole number or [least, most]"
    if kind == "literal_error":
        expected = "one of " + context["expected"].replace("'", "").replace(" or ", ", ")
    return f"{f'{path[0]}:' if '[key]' in path else f'{where} ='} {found} is not {expected}"


_UNFIT = ("missing", "unexpected_keyword_argument", "dataclass_type")
_RECORDS = {"stopping": Stopping, "resources": Resources}
_LISTS = {"objectives": "names", "initial": "`knob: value` mappings"}
_EXPECTED = {
    "int_type": "a whole number", "greater_than_equal": "a whole number",
    "less_than_equal": "a whole number", "greater_than": "positive", "bool_type": "true or false",
    "string_type": "a name", "invalid_key": "a name",
}  # fmt: skip

"""Generated search specifications: valid ones are read as written and all their points lie in the
space; broken ones give one line that names the key, never anything else."""

import datetime
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cbnerf.config import Config
from cbnerf.overrides import with_overrides
from cbnerf.search.plan import make_plan
from cbnerf.search.sampler import initial_points, make_study, propose, quasi_random_point, suggest
from cbnerf.search.spec import (
    QUALITIES,
    Choices,
    Cost,
    SearchSpec,
    load_spec,
    parse_spec,
)
from cbnerf.strict_yaml import shown

pytestmark = pytest.mark.search

bounded = settings(derandomize=True, max_examples=30, deadline=None, database=None)

INTEGERS = {
    "codebook.size": (2, 4096), "codebook.dim": (1, 64), "refiner.blocks": (1, 6),
    "refiner.neighbours": (1, 8), "refiner.channels": (1, 64),
}  # fmt: skip
REALS = {
    "codebook.beta": (0.0, 4.0), "loss.lambda_vq": (0.0, 1e3), "refiner.optim.lr": (1e-6, 1.0),
    "loss.lambda_imitation": (0.0, 10.0), "field.planes.tv_weight": (0.0, 1.0),
}  # fmt: skip
WORDS = {
    "codebook.imitation": ["vq", "feature", "ce"], "codebook.vq_loss": ["paper", "released"],
    "codebook.normalize": [True, False],
}  # fmt: skip


@st.composite
def domains(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """A domain of a knob, as the values of a YAML file."""
    if name in WORDS:
        choices = st.lists(st.sampled_from(WORDS[name]), min_size=1, unique=True)
        return {"choices": draw(choices)}
    low, high = (INTEGERS | REALS)[name]
    values = st.integers(low, high) if name in INTEGERS else st.floats(low, high)
    form = draw(st.sampled_from(["choices", "range", "log", "step"]))
    ends = sorted(draw(st.lists(values, min_size=2, max_size=5, unique=True)))
    if form == "choices":
        return {"choices": ends}
    domain = {"low": ends[0], "high": ends[-1]}
    if form == "log" and ends[0] > 0:
        return domain | {"log": True}
    if form == "step":
        step = (ends[-1] - ends[0]) / draw(st.integers(1, 40))
        domain["step"] = max(int(step), 1) if name in INTEGERS else step
        if name in REALS:  # as somebody would write it
            domain = {key: float(f"{value:.2g}") for key, value in domain.items()}
        if not domain["low"] < domain["low"] + domain["step"] <= domain["high"]:
            return {"low": ends[0], "high": ends[-1]}
    return domain


@st.composite
def specifications(draw: st.DrawFn) -> dict[str, Any]:
    names = st.sampled_from([*INTEGERS, *REALS, *WORDS])
    searched = draw(st.lists(names, min_size=1, max_size=5, unique=True))
    spec: dict[str, Any] = {"space": {name: draw(domains(name)) for name in searched}}
    costs = draw(st.lists(st.sampled_from(get_args(Cost)), unique=True))
    optional = {
        "method": st.just("cb-nerf"),
        "resolution": st.sampled_from(["auto", "tiny", "x2-128"]),
        "trials": st.integers(1, 1000),
        "seed": st.integers(0, 2**62),
        "sampler": st.sampled_from(["sobol-tpe", "tpe", "random"]),
        "objectives": st.sampled_from(QUALITIES).map(lambda quality: [quality, *costs]),
        "limits": st.dictionaries(st.sampled_from(["parameters"]), st.integers(10**8, 10**9)),
        "stopping": st.fixed_dictionaries(
            {},
            optional={
                "rule": st.sampled_from(["race", "none"]),
                "rungs": st.integers(1, 5),
                "eta": st.integers(2, 9),
                "grace_period": st.integers(1, 500),
                "threshold": st.floats(0.01, 0.49),
                "margin": st.floats(0, 1),
            },
        ),
        "fixed": st.just({"loss.lambda_recon": 3, "refiner.optim.steps": 50.0}),
        "initial": st.lists(points(spec["space"]), max_size=2),
    }
    return spec | draw(st.fixed_dictionaries({}, optional=optional))


def points(space: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Choices and lower ends."""
    some = {
        name: st.sampled_from(domain.get("choices") or [domain["low"]])
        for name, domain in space.items()
    }
    return st.fixed_dictionaries({}, optional=some)


def plain(spec: SearchSpec) -> dict[str, Any]:
    """A specification as the values of a YAML file again."""

    def lists(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: lists(v) for name, v in value.items() if v is not None}
        return [lists(v) for v in value] if isinstance(value, list | tuple) else value

    return lists(asdict(spec))


@pytest.fixture(scope="module")
def write(tmp_path_factory) -> Callable[[Any], Path]:
    folder = tmp_path_factory.mktemp("specifications")

    def write(content: Any) -> Path:
        file = folder / "spec.yaml"
        text = content if isinstance(content, str | bytes) else yaml.safe_dump(content)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    return write


def refusal(file: Path) -> str:
    """The one line that says what is wrong with a file."""
    with pytest.raises(ValueError) as caught:
        load_spec(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ") and message.isprintable() and len(message) < 1500
    return message.removeprefix(f"{file}: ")


@bounded
@given(specifications())
def test_a_valid_specification_is_read_as_written(write, content: dict[str, Any]):
    spec = load_spec(write(content))
    assert parse_spec(plain(spec)) == spec
    for name, written in content["space"].items():
        domain = spec.space[name]
        if isinstance(domain, Choices):
            assert list(domain.choices) == written["choices"]
        else:
            assert domain.low == written["low"] in domain and domain.high in domain
            # Less than a step is cut off.
            assert 0 <= written["high"] - domain.high <= (domain.step or 0)
    for name in {"trials", "seed", "sampler", "method"} & content.keys():
        assert getattr(spec, name) == content[name]


@bounded
@given(specifications())
@pytest.mark.filterwarnings("error")  # Optuna's of values that it changes
def test_every_point_of_a_search_lies_in_its_space(write, content: dict[str, Any]):
    spec = load_spec(write(content))
    plan = make_plan(
        spec, scenes="arcade", data=None, name="sweep", storage=Path("runs"), has_gpu=False
    )
    study = make_study(plan)
    tried = initial_points(plan) + [quasi_random_point(plan, number) for number in (0, 1, 97)]
    for number in range(6):
        trial = propose(plan, study, number)
        tried.append(suggest(trial, plan))
        study.tell(trial, [float(number)] * len(spec.objectives))
    for point in tried:
        assert all(value in spec.space[name] for name, value in point.items())
        assert isinstance(with_overrides(plan.base, point), Config)


VALID: dict[str, Any] = {
    "method": "cb-nerf",
    "resolution": "tiny",
    "trials": 4,
    "seed": 1,
    "sampler": "tpe",
    "objectives": ["val/psnr"],
    "limits": {"parameters": 10_000},
    "stopping": {"rule": "race", "rungs": 2, "eta": 3, "threshold": 0.1, "margin": 0.1},
    "resources": {"workers": 1, "cpus_per_worker": 1},
    "fixed": {"codebook.beta": 1.0, "refiner.blocks": 2, "codebook.vq_loss": "paper"},
    "space": {
        "codebook.size": {"low": 8, "high": 64, "step": 8},
        "loss.lambda_vq": {"low": 0.5, "high": 2.0, "log": True},
        "codebook.dim": {"choices": [4, 8]},
        "codebook.imitation": {"choices": ["vq", "ce"]},
    },
    "initial": [{"codebook.dim": 4}],
}
LEAVES = [
    (section,) for section in VALID
] + [
    (section, name) for section, values in VALID.items() if isinstance(values, dict)
    for name in values
] + [
    ("space", knob, key) for knob, domain in VALID["space"].items() for key in domain
] + [("initial", 0, "codebook.dim")]  # fmt: skip
JUNK = st.one_of(
    st.none(),
    st.sampled_from([float("nan"), float("inf"), -float("inf"), 10**30, -(10**400), 1e300, -7]),
    st.dates(), st.datetimes(), st.binary(min_size=1, max_size=3), st.just({"a": 1}),
    st.just([[["deep"]]]), st.just({1: 2}), st.just(""), st.text(min_size=1, max_size=5),
    st.just("12\n34"), st.just("x" * 5000), st.just({datetime.date(2026, 1, 1)}),
)  # fmt: skip


def changed(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at this place."""
    if not path:
        return value
    copy = content.copy()
    copy[path[0]] = changed(content[path[0]], path[1:], value)
    return copy


def test_what_is_broken_below_is_whole_above(write):
    load_spec(write(VALID))


@settings(bounded, max_examples=150)
@given(st.sampled_from(LEAVES), JUNK)
def test_a_broken_value_is_one_line_that_names_its_key(write, path: tuple[Any, ...], value: Any):
    # `step: null` is no step, and a word may be a number in quotes.
    if (value is None and path[-1] == "step") or (isinstance(value, str) and is_number(value)):
        return
    message = refusal(write(changed(VALID, path, value)))
    section = path[0] if len(path) == 1 else path[-1 if path[0] != "space" else 1]
    key = "objective" if section == "objectives" else str(section)
    assert key in message or (value == {"a": 1} and "'a'" in message)


def is_number(text: str) -> bool:
    try:
        return float(text) is not None
    except ValueError:
        return False


@settings(bounded, max_examples=50)
@given(st.sampled_from([path for path in LEAVES if len(path) > 1] + [()]), st.text(max_size=8))
def test_an_unknown_key_is_one_line_that_names_it(write, path: tuple[Any, ...], name: str):
    parent = VALID
    for part in path[:-1]:
        parent = parent[part]
    if name not in parent and path[:1] != ("space",):
        assert shown(name) in refusal(write(changed(VALID, path[:-1], {**parent, name: 1})))


@settings(bounded, max_examples=100)
@given(st.one_of(st.text(max_size=60), st.binary(max_size=60),
                 st.text("[]{}:,-&*!|>'\"%@`# \n\tab01.<", max_size=60)))  # fmt: skip
def test_any_other_file_is_one_line(write, text: str | bytes):
    file = write(text.encode("utf-8", "replace") if isinstance(text, str) else text)
    refusal(file)

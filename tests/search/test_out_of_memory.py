"""A unit that runs out of memory is not retried, and what is at least as large is not trained."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from optuna.trial import TrialState
from ray import cloudpickle, tune

from cbnerf.config import Config
from cbnerf.overrides import with_overrides
from cbnerf.search import driver, worker
from cbnerf.search.plan import Plan, Unit
from cbnerf.search.report import study_page
from cbnerf.search.sizes import needs_as_much
from cbnerf.search.state import StudyState
from cbnerf.search.steering import suggestions
from cbnerf.search.worker import run_units

pytestmark = pytest.mark.search
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find this file

MESSAGE = (
    "CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has a total capacity of 8.00 GiB of "
    "which 1.00 GiB is free. See documentation for Memory Management"
)
NO_STOPPING = {"rule": "none", "rungs": 1}
LARGE = [{"codebook.size": 1024}]


@pytest.fixture(autouse=True, scope="module")
def quiet() -> None:
    driver.quieten_libraries()


@pytest.mark.parametrize(
    ("changes", "is_large"),
    [
        ({}, True),
        ({"codebook.size": 2048, "refiner.channels": 64}, True),
        ({"codebook.size": 2048, "refiner.channels": 32}, False),
        ({"codebook.beta": 0.01, "refiner.optim.lr": 1e-4, "seed": 5}, True),
        ({"codebook.size": 2048, "loss.lambda_recon": 0.0}, False),
        ({"codebook.position_weight": 1.0}, True),
        ({"codebook.size": 2048, "codebook.kind": "fsq"}, False),
        ({"codebook.size": 2048, "codebook.normalize": True}, False),
        ({"refiner.optim.passes": 1.0, "refiner.optim.batch_size": 31}, False),
    ],
)
def test_what_is_at_least_as_large_is_so_in_all_sizes(changes: dict[str, Any], is_large: bool):
    assert needs_as_much(with_overrides(Config(), changes), Config()) is is_large


def lose(state: StudyState, unit: Unit) -> bool:
    state.record(unit, None)
    state.explain(unit, "CUDA out of memory")
    return state.record_out_of_memory(unit)


def test_no_configuration_that_is_as_large_is_trained_afterwards(tiny_plan: Callable[..., Plan]):
    plan = tiny_plan("arcade", trials=12, stopping=NO_STOPPING, initial=LARGE)
    state = StudyState(plan)
    first = state.next_unit()  # the preset, with 64 codes
    assert first is not None
    state.record(first, {"val/psnr": 20.0})
    large = state.next_unit()
    assert large is not None and large.overrides["codebook.size"] == 1024
    assert lose(state, large)
    for lived in (state, StudyState(plan)):  # also after the driver was killed
        found = lived.smaller_without_memory
        assert found(large.overrides | {"codebook.beta": 0.1}) == large.configuration
        assert found(large.overrides | {"codebook.size": 128}) is None
    state = StudyState(plan)
    while unit := state.next_unit():
        assert unit.overrides["codebook.size"] < 1024
        state.record(unit, {"val/psnr": 20.0})
    trials = state.study.get_trials()
    untrained = [t.number for t in trials if t.params["codebook.size"] == 1024][1:]
    assert untrained and state.is_over and [*state.too_large] == untrained
    for number in untrained:
        assert trials[number].state == TrialState.PRUNED and not state.results(number)
        why = "not trained: at least as large as #1, which ran out of memory"
        assert state.describe_end(trials[number]) == why
    again = StudyState(plan, adopt=False)
    assert again.too_large == state.too_large
    notes = study_page(again, plan.base, 0, {"arcade": {"stage 1": {}}}, "").notes
    said = f"{len(untrained)} configurations were not trained: at least as large as #1, which ran"
    assert [note for note in notes if note.startswith(said)]


def test_suggestions_leave_out_what_is_too_large(tiny_plan: Callable[..., Plan], monkeypatch):
    plan = tiny_plan("arcade", trials=12, stopping=NO_STOPPING)
    state = StudyState(plan)
    first = state.next_unit()
    assert first is not None
    lose(state, first)  # the smallest choice: nothing is left
    monkeypatch.setattr("cbnerf.search.steering.plan_study", lambda storage, name: plan)
    assert suggestions(plan.storage, plan.name, 3)["next"] == []
    assert state.next_unit() is None and state.is_over


def test_a_unit_is_not_too_large_where_a_larger_one_was_trained(tiny_plan: Callable[..., Plan]):
    plan = tiny_plan("arcade,blinds", trials=4, stopping=NO_STOPPING)
    state = StudyState(plan)
    units = {}
    while len(units) < 2:  # Until one has finished, scenes of one configuration follow each other.
        unit = state.next_unit()
        assert unit is not None
        units[unit.scene] = unit
    state.record(units["arcade"], {"val/psnr": 20.0})
    assert not lose(state, units["blinds"]._replace(scene="arcade"))
    assert state.smaller_without_memory(units["blinds"].overrides) is None
    assert lose(state, units["blinds"])  # Of this scene none was trained.


UNIT = [Unit(0, "arcade", 0, {})._asdict()]


def run_out(*args: Any) -> dict[str, float]:
    raise torch.OutOfMemoryError(MESSAGE)


@pytest.mark.parametrize(("reserved", "taken"), [(0, None), (1, 0.4), (0.25, 0.3)])
def test_a_process_that_had_its_share_of_the_gpu_says_that_it_ran_out_of_memory(
    tiny_plan: Callable[..., Plan], monkeypatch, reserved: float, taken: float | None
):
    monkeypatch.setattr(worker, "_run_unit", run_out)
    monkeypatch.setattr(worker, "gpu_share", lambda: taken)
    plan = tiny_plan(has_gpu=True, resources={"gpus_per_worker": reserved})
    told = {"failure": "CUDA out of memory. Tried to allocate 9.00 GiB", "out_of_memory": True}
    assert list(run_units(UNIT, plan))[1:] == [told | {"done": True}]


def test_a_process_whose_share_others_have_taken_is_retried(
    tiny_plan: Callable[..., Plan], monkeypatch
):
    monkeypatch.setattr(worker, "_run_unit", run_out)
    monkeypatch.setattr(worker, "gpu_share", lambda: 0.2)
    units = run_units(UNIT, tiny_plan(has_gpu=True, resources={"gpus_per_worker": 0.25}))
    assert next(units)["begun"]
    with pytest.raises(torch.OutOfMemoryError):
        next(units)


@pytest.fixture(scope="module")
def connected(ray_address: str) -> Iterator[None]:
    ray.init(address=ray_address, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def train_on_a_small_gpu(about: dict[str, Any], plan: Plan) -> None:
    """The worker of a unit, where 1024 codes are too many."""

    def train(plan: Plan, unit: Unit, device: torch.device) -> dict[str, float]:
        with (plan.storage / "trained").open("a", encoding="utf-8") as file:
            file.write(f"{unit.configuration} {unit.overrides['codebook.size']}\n")
        if unit.overrides["codebook.size"] == 1024:
            raise torch.OutOfMemoryError(MESSAGE)
        return {"val/psnr": 20.0 + unit.configuration, "seconds": 1.0}

    worker._run_unit = train
    for told in run_units(about["units"], plan):
        tune.report(told)


def test_a_search_trains_a_too_large_configuration_once_and_none_like_it(
    tiny_plan: Callable[..., Plan], connected, monkeypatch, capfd: pytest.CaptureFixture[str]
):
    plan = tiny_plan("arcade", trials=8, stopping=NO_STOPPING, initial=LARGE)
    monkeypatch.setattr(driver, "UnitTrainable", train_on_a_small_gpu)
    state = StudyState(plan)
    driver._search(plan, state, concurrency=1)
    trained = Path(plan.storage / "trained").read_text(encoding="utf-8").splitlines()
    assert [line for line in trained if line.endswith(" 1024")] == ["1 1024"]
    assert state.is_over and state.too_large and set(state.too_large.values()) == {1}
    assert len(trained) + len(state.too_large) == 8
    output = capfd.readouterr().out
    assert "#01  arcade failed: CUDA out of memory. Tried to allocate 9.00 GiB\n" in output
    said = "#01  ran out of memory: configurations at least as large in codebook.size are not tr"
    assert said in output
    assert state.failures[0][1].startswith("CUDA out of memory")

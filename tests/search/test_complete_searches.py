"""Whole searches through Ray: those of `tune_configs/`, and one that is repeated bit for bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from drivers import ROOT, SMOKE, call_tune, plan_of, search_without_ray

from cbnerf.search.state import StudyState

pytestmark = [
    pytest.mark.search,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),  # MLflow's
]

CPU = ROOT / "tune_configs" / "cpu.yaml"
OTHERS = sorted({*(ROOT / "tune_configs").glob("*.yaml")} - {SMOKE, CPU})
NAME = "study"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage that several studies share, and with it their fields."""
    return tmp_path_factory.mktemp("storage")


@pytest.mark.parametrize("file", OTHERS, ids=lambda file: file.stem)
def test_every_search_of_tune_configs_comes_to_its_report(
    file: Path,
    storage: Path,
    ray_address: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    small = ["--scenes", "arcade", "--resolution", "tiny", "--trials", "2"]
    where = ["--storage", str(storage), "--name", file.stem, "--address", ray_address]
    arguments = ["--config", str(file), *small, *where]
    assert call_tune(monkeypatch, *arguments) == 0, capfd.readouterr().err
    study = storage / "studies" / file.stem
    assert {"best.yaml", "report.md", "report.html"} <= {entry.name for entry in study.iterdir()}
    trials = StudyState(plan_of(storage, file.stem), adopt=False).study.get_trials()
    # A point of `initial` beyond the number of trials waits for a search with more.
    assert sum(trial.state.is_finished() for trial in trials) == 2


def test_one_at_a_time_a_race_is_the_same_bit_for_bit_with_and_without_ray(
    tmp_path: Path,
    ray_address: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    race = ["--config", str(CPU), "--scenes", "arcade,blinds", "--resolution", "tiny"]
    arguments = [*race, "--name", NAME, "--trials", "3", "--concurrency", "1"]
    where = ["--storage", "with", "--address", ray_address]
    assert call_tune(monkeypatch, *arguments, *where) == 0, capfd.readouterr().err
    plan = plan_of(tmp_path / "with", NAME)
    alone = search_without_ray(replace(plan, storage=tmp_path / "without"))
    assert trials_of(StudyState(plan, adopt=False)) == trials_of(alone)


def trials_of(state: StudyState) -> list[tuple[dict[str, Any], list[float] | None, dict[Any, Any]]]:
    """Knobs, objectives and values of the units of each configuration, but for their seconds."""
    trials = []
    for trial in state.study.get_trials():
        units = {
            place: metrics and {name: v for name, v in metrics.items() if name != "seconds"}
            for place, metrics in state.results(trial.number).items()
        }
        trials.append((trial.params, trial.values, units))
    return trials

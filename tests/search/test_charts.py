"""The charts of a study with planted results."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from cbnerf.search.charts import charts, importances
from cbnerf.search.plan import Unit
from cbnerf.search.state import StudyState

pytestmark = pytest.mark.search

ALONE = {"rule": "none"}
CHARTS = ["History of val/psnr", "Parallel coordinates", "Importances", "Race", "Cost"]


def run(state: StudyState, score: Callable[[Unit], float]) -> None:
    while unit := state.next_unit():
        psnr = score(unit)
        state.record(unit, {"val/psnr": psnr, "val/ssim": psnr / 40, "seconds": 2.0})


def titles(state: StudyState) -> list[str]:
    return [chart.title for chart in charts(state)]


def beta(unit: Unit) -> float:
    return 20 + unit.overrides["codebook.beta"]


def test_a_study_with_a_shared_stage_1_has_all_charts(tiny_plan):
    state = StudyState(tiny_plan(trials=6, stopping=ALONE))
    run(state, beta)
    state.record_field("arcade", "field-arcade-0123", 30.0)
    drawn = list(charts(state))
    assert [chart.title for chart in drawn] == CHARTS
    assert all(chart.html.count("Plotly.newPlot(") == 1 for chart in drawn)


def test_charts_load_nothing_from_elsewhere(tiny_plan):
    state = StudyState(tiny_plan(trials=4, stopping=ALONE))
    run(state, beta)
    html = "".join(chart.html for chart in charts(state))
    tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", html)
    assert tags and not any(re.search(r"(?:src|href)=", tag) for tag in tags)


def test_without_a_shared_stage_1_and_with_few_configurations_charts_are_left_out(tiny_plan):
    state = StudyState(tiny_plan(trials=2, stopping=ALONE))
    run(state, beta)
    assert titles(state) == ["History of val/psnr", "Race"]


@pytest.mark.parametrize("objectives", [["val/psnr", "val/ssim"], ["val/psnr", "codebook.size"]])
def test_several_objectives_have_histories_and_a_pareto_front(tiny_plan, objectives: list[str]):
    state = StudyState(tiny_plan(trials=5, stopping=ALONE, objectives=objectives))
    run(state, beta)
    histories = [f"History of {name}" for name in objectives]
    assert titles(state)[:3] == [*histories, "Pareto front"]


@pytest.mark.parametrize(
    "scenes, bars", [("arcade", ["overall"]), ("arcade,blinds", ["overall", "arcade", "blinds"])]
)
def test_importances_tell_what_makes_a_configuration_good(tiny_plan, scenes: str, bars: list[str]):
    """One knob decides who is best, another one who is worst."""
    space: dict[str, Any] = {
        "codebook.beta": {"low": 0.0, "high": 1.0},
        "codebook.ema_decay": {"low": 0.1, "high": 0.9},
    }
    plan = tiny_plan(scenes, trials=60, stopping=ALONE, space=space, sampler="random")
    state = StudyState(plan)

    def score(unit: Unit) -> float:
        best, worst = unit.overrides["codebook.beta"], unit.overrides["codebook.ema_decay"]
        return 20 + best - 5 * (worst > 0.75)

    run(state, score)
    drawn = importances(state).data
    assert [bar.name for bar in drawn] == bars
    for bar in drawn:
        shares = dict(zip(bar.x, bar.y, strict=True))
        assert shares["codebook.beta"] > 2 * shares["codebook.ema_decay"]

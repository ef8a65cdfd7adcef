"""The charts of a study with planted results."""

import json
import re

import pytest
from objectives import train_units

from cbnerf.search.charts import charts
from cbnerf.search.effects import Effect
from cbnerf.search.plan import Unit
from cbnerf.search.racing import Metrics
from cbnerf.search.state import StudyState

pytestmark = pytest.mark.search

ALONE = {"rule": "none"}
CHARTS = ["History of val/psnr", "Parallel coordinates", "Race", "Cost"]


def titles(state: StudyState) -> list[str]:
    return [chart.title for chart in charts(state, [])]


def beta(unit: Unit) -> Metrics:
    psnr = 20 + unit.overrides["codebook.beta"]
    return {"val/psnr": psnr, "val/ssim": psnr / 40, "seconds": 2.0}


def test_a_study_with_a_shared_stage_1_has_all_charts(tiny_plan):
    state = StudyState(tiny_plan(trials=6, stopping=ALONE))
    train_units(state, beta)
    state.record_field("arcade", "field-arcade-0123", 30.0)
    drawn = list(charts(state, []))
    assert [chart.title for chart in drawn] == CHARTS
    assert all(chart.html.count("Plotly.newPlot(") == 1 for chart in drawn)


def test_charts_load_nothing_from_elsewhere(tiny_plan):
    state = StudyState(tiny_plan(trials=4, stopping=ALONE))
    train_units(state, beta)
    html = "".join(chart.html for chart in charts(state, []))
    tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", html)
    assert tags and not any(re.search(r"(?:src|href)=", tag) for tag in tags)


def test_without_a_shared_stage_1_and_with_few_configurations_charts_are_left_out(tiny_plan):
    state = StudyState(tiny_plan(trials=2, stopping=ALONE))
    train_units(state, beta)
    assert titles(state) == ["History of val/psnr", "Race"]


@pytest.mark.parametrize("objectives", [["val/psnr", "val/ssim"], ["val/psnr", "codebook.size"]])
def test_several_objectives_have_histories_and_a_pareto_front(tiny_plan, objectives: list[str]):
    state = StudyState(tiny_plan(trials=5, stopping=ALONE, objectives=objectives))
    train_units(state, beta)
    histories = [f"History of {name}" for name in objectives]
    assert titles(state)[:3] == [*histories, "Pareto front"]


def test_effects_are_drawn_with_their_intervals_the_largest_on_top(tiny_plan):
    state = StudyState(tiny_plan(trials=2, stopping=ALONE))
    train_units(state, beta)
    effects = [
        Effect("codebook.beta", 0.5, 0.25, 1.0, 2.0, True),
        Effect("codebook.size", 0.125, 0.0, 0.375, 64, True),
    ]
    first, *_ = drawn = list(charts(state, effects))
    assert first.title == "Effects"
    assert [chart.title for chart in drawn[1:]] == ["History of val/psnr", "Race"]
    match = re.search(r"Plotly\.newPlot\(\s*\"chart-0\",\s*(\[.*?\}\]),", first.html, re.DOTALL)
    assert match is not None
    (bar,) = json.loads(match[1])
    assert bar["y"] == ["codebook.size", "codebook.beta"]  # plotly draws from the bottom
    assert bar["error_x"]["array"] == [0.25, 0.5] and bar["error_x"]["arrayminus"] == [0.125, 0.25]
    assert bar["marker"]["color"][0] != bar["marker"]["color"][1]

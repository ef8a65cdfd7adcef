"""The page of a study whose results are planted."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from cbnerf.search.charts import html_report, importances
from cbnerf.search.ledger import Ledger
from cbnerf.search.plan import Unit
from cbnerf.tables import Cell, Table

pytestmark = pytest.mark.search

ALONE = {"rule": "none"}
CHARTS = ["History of val/psnr", "Parallel coordinates", "Importances", "Race", "Cost"]
TABLE = Table("", ["<b>"], [[Cell("1")]])


def run(ledger: Ledger, score: Callable[[Unit], float]) -> None:
    while unit := ledger.next_unit():
        psnr = score(unit)
        ledger.book(unit, {"val/psnr": psnr, "val/ssim": psnr / 40, "seconds": 2.0})


def page_of(ledger: Ledger) -> str:
    best = ledger.best()
    assert best is not None
    return html_report(
        ledger, "codebook: {size: 64}\n", best.number, "precision of stage 1: float32", TABLE, TABLE
    )


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def beta(unit: Unit) -> float:
    return 20 + unit.overrides["codebook.beta"]


def test_the_page_has_a_chart_under_each_heading(tiny_plan):
    ledger = Ledger(tiny_plan(trials=6, stopping=ALONE))
    run(ledger, beta)
    ledger.note_field("arcade", "field-arcade-0123", 30.0)
    page = page_of(ledger)
    best = ledger.best()
    assert best is not None
    assert headings(page) == [
        f"Best configuration: number {best.number}", *CHARTS, "Configurations"
    ]  # fmt: skip
    assert page.count("Plotly.newPlot(") == len(CHARTS)


def test_the_page_loads_nothing_from_elsewhere(tiny_plan):
    ledger = Ledger(tiny_plan(trials=4, stopping=ALONE))
    run(ledger, beta)
    page = page_of(ledger)
    tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page)
    assert tags and not any(re.search(r"(?:src|href)=", tag) for tag in tags)


def test_without_a_shared_stage_1_and_with_few_configurations_charts_are_left_out(tiny_plan):
    ledger = Ledger(tiny_plan(trials=2, stopping=ALONE))
    run(ledger, beta)
    assert headings(page_of(ledger))[1:] == ["History of val/psnr", "Race", "Configurations"]


@pytest.mark.parametrize("objectives", [["val/psnr", "val/ssim"], ["val/psnr", "codebook.size"]])
def test_several_objectives_have_histories_and_a_pareto_front(tiny_plan, objectives: list[str]):
    ledger = Ledger(tiny_plan(trials=5, stopping=ALONE, objectives=objectives))
    run(ledger, beta)
    histories = [f"History of {name}" for name in objectives]
    assert headings(page_of(ledger))[1:4] == [*histories, "Pareto front"]


def test_a_name_cannot_break_the_page(tiny_plan):
    ledger = Ledger(tiny_plan("arcade", trials=1, stopping=ALONE))
    run(ledger, beta)
    page = html_report(ledger, "<script>", 0, "", TABLE, TABLE)
    assert "<pre>&lt;script&gt;</pre>" in page and page.count("<th>&lt;b&gt;</th>") == 2


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
    ledger = Ledger(plan)

    def score(unit: Unit) -> float:
        best, worst = unit.overrides["codebook.beta"], unit.overrides["codebook.ema_decay"]
        return 20 + best - 5 * (worst > 0.75)

    run(ledger, score)
    drawn = importances(ledger).data
    assert [bar.name for bar in drawn] == bars
    for bar in drawn:
        shares = dict(zip(bar.x, bar.y, strict=True))
        assert shares["codebook.beta"] > 2 * shares["codebook.ema_decay"]

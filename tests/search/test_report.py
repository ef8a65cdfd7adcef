from pathlib import Path

import pytest

from cbnerf.overrides import load_config, with_overrides
from cbnerf.report.tables import Table, to_html, to_markdown
from cbnerf.search.report import configuration_table, scene_table, study_page, write_report
from cbnerf.search.state import StudyState
from cbnerf.search.tracking import NOT_COMPARABLE

pytestmark = pytest.mark.search


def scores(psnr: float, gain: float, *, val: bool = True) -> dict[str, dict[str, float]]:
    def stage(psnr: float, ssim: float) -> dict[str, float]:
        test = {"test/psnr": psnr + 1, "test/ssim": ssim + 0.1}
        return test | ({"val/psnr": psnr, "val/ssim": ssim} if val else {})

    return {"stage 1": stage(psnr, 0.5), "refined": stage(psnr + gain, 0.6)}


def cells(table: Table) -> list[list[str]]:
    return [table.header, *([cell.text for cell in row] for row in table.rows)]


def test_the_table_shows_scenes_gains_and_their_means():
    header, fern, room, mean = cells(
        scene_table({"fern": scores(20.0, 0.5), "room": scores(30.0, -0.25)})
    )
    assert header == [
        "scene", "val PSNR stage 1", "refined", "gain", "test PSNR stage 1", "refined", "gain",
        "test SSIM stage 1", "refined", "gain",
    ]  # fmt: skip
    ssim = ["0.6000", "0.7000", "+0.1000"]
    assert fern == ["fern", "20.00", "20.50", "+0.50", "21.00", "21.50", "+0.50", *ssim]
    assert room == ["room", "30.00", "29.75", "-0.25", "31.00", "30.75", "-0.25", *ssim]
    assert mean == ["mean", "25.00", "25.12", "+0.12", "26.00", "26.12", "+0.12", *ssim]


def test_without_validation_views_their_columns_stay_empty():
    *_, mean = rows = cells(scene_table({"fern": scores(20.0, 0.5, val=False)}))
    assert rows[1][1:4] == mean[1:4] == ["-", "-", "-"]
    assert mean[4] == "21.00"


def test_the_lines_of_a_table_are_equally_long():
    table = scene_table({"a": scores(9.5, 0.5), "a long name": scores(100.0, -12.0)})
    assert len({len(line) for line in to_markdown(table).splitlines()}) == 1


def finish(state: StudyState, values: list[float | None]) -> None:
    for value in values:
        unit = state.next_unit()
        assert unit is not None
        state.record(unit, None if value is None else {"val/psnr": value})


def test_configurations_are_listed_best_first(tiny_plan):
    state = StudyState(tiny_plan("arcade", trials=4, stopping={"rule": "none"}))
    finish(state, [20.0, None, 21.5])
    header, *rows = cells(configuration_table(state))
    assert header == ["#", "val/psnr", "end", *state.plan.spec.space]
    assert [row[:3] for row in rows] == [
        ["2", "21.5", "finished"], ["0", "20", "finished"], ["1", "-", "fail"],
    ]  # fmt: skip


def test_the_report_names_the_best_and_its_file_can_be_trained_from(tiny_plan):
    state = StudyState(tiny_plan("arcade", trials=2, stopping={"rule": "none"}))
    finish(state, [20.0, 21.0])
    best = state.best()
    assert best is not None
    config = with_overrides(state.plan.base, best.params | {"field.precision": "bfloat16"})
    files = write_report(state, config, best.number, {"arcade": scores(20.0, 1.0)})
    by_name: dict[str, Path] = {file.name: file for file in files}
    assert load_config(by_name["best.yaml"]) == config
    text = by_name["report.md"].read_text(encoding="utf-8")
    assert "Best configuration: number 1" in text and NOT_COMPARABLE in text
    tables = scene_table({"arcade": scores(20.0, 1.0)}), configuration_table(state)
    assert all(to_markdown(table) in text for table in tables)
    page = by_name["report.html"].read_text(encoding="utf-8")
    assert all("precision of stage 1: bfloat16" in written for written in (text, page))
    assert all(to_html(table) in page for table in tables)


def test_the_report_names_knobs_with_and_without_effect(tiny_plan):
    space = {
        "codebook.size": {"choices": [64, 128]},
        "codebook.beta": {"low": 0.05, "high": 2.0, "log": True},
    }
    plan = tiny_plan("arcade,blinds", trials=12, stopping={"rule": "none"}, space=space)
    state = StudyState(plan)
    while unit := state.next_unit():
        psnr = 20.0 + 0.5 * (unit.overrides["codebook.size"] == 128)
        state.record(unit, {"val/psnr": psnr + len(unit.scene), "seconds": 1.0})
    best = state.best()
    assert best is not None
    shown = {scene: scores(20.0, 1.0) for scene in plan.scenes}
    page = study_page(state, plan.base, best.number, shown, "")
    assert page.notes[0].startswith(f"best: configuration {best.number}, 0.000 dB ahead of")
    assert page.notes[1] == "knobs with an effect, the largest first: codebook.size"
    assert page.notes[2] == "knobs without an effect that is seen: codebook.beta"
    (section,) = [one for one in page.sections if one.title.startswith("Effect of each knob (dB")]
    table, by_scene = section.blocks
    assert isinstance(table, Table) and isinstance(by_scene, Table)
    assert by_scene.header == ["knob", "arcade", "blinds"]
    (of_size,) = (row for _, *row in cells(by_scene)[1:])
    assert of_size[0].startswith("0.5") and of_size[1].startswith("0.5")
    (size, beta) = (row for _, *row in cells(table)[1:])
    assert size[0].startswith("0.5") and size[-1].endswith("dB, best at 128")
    assert beta[1].startswith("0.000 dB to ") and beta[-1].startswith("no effect seen (within +-")

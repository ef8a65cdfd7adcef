"""What one process appends to the curves of a unit, and another one reads."""

from pathlib import Path

import pytest

from cbnerf.search.curves import (
    CURVES_FILE,
    append_point,
    begin_curves,
    read_curves,
    reserve_curves,
)

pytestmark = pytest.mark.search


def values(folder: Path) -> dict[int, dict[str, float]]:
    return {point.step: point.metrics for point in read_curves(folder) if point.metrics}


def test_a_unit_that_has_not_begun_has_no_curves(tmp_path: Path):
    assert read_curves(tmp_path / "0000" / "arcade") == []
    reserve_curves(tmp_path / "0000" / "arcade")
    assert read_curves(tmp_path / "0000" / "arcade") == []
    begin_curves(tmp_path / "0000" / "arcade")
    (point,) = read_curves(tmp_path / "0000" / "arcade")
    assert point.node and not point.metrics


def test_a_resumed_unit_drops_a_torn_line_and_the_last_of_repeated_steps_counts(tmp_path: Path):
    begin_curves(tmp_path)
    append_point(tmp_path, 5, {"val/psnr": 20.0})
    append_point(tmp_path, 10, {"val/psnr": 21.0})
    whole = values(tmp_path)
    with (tmp_path / CURVES_FILE).open("a", encoding="utf-8") as file:
        file.write('{"node": "a", "step": 15, "metr')
    assert values(tmp_path) == whole == {5: {"val/psnr": 20.0}, 10: {"val/psnr": 21.0}}
    begin_curves(tmp_path)
    append_point(tmp_path, 10, {"val/psnr": 22.0})
    assert values(tmp_path) == {5: {"val/psnr": 20.0}, 10: {"val/psnr": 22.0}}


def test_any_cut_of_the_file_can_be_read(tmp_path: Path):
    begin_curves(tmp_path)
    for step in (1, 2, 3):
        append_point(tmp_path, step, {"train/loss": 1 / step, "val/psnr": float("nan")})
    content = (tmp_path / CURVES_FILE).read_bytes()
    for cut in range(len(content)):
        (tmp_path / CURVES_FILE).write_bytes(content[:cut])
        num_lines = content[:cut].count(b"\n")
        assert [point.step for point in read_curves(tmp_path)] == list(range(num_lines))

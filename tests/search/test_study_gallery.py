import re
from collections.abc import Callable
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from objectives import train_units

from cbnerf.report.page import Chart
from cbnerf.search.plan import Plan
from cbnerf.search.state import StudyState
from cbnerf.search.study_gallery import study_gallery
from cbnerf.training.stages import strip_file

pytestmark = pytest.mark.search


def finish(plan: Plan, values: list[float]) -> StudyState:
    """A study whose configurations have these objectives on every scene."""
    state = StudyState(plan)
    train_units(state, lambda unit: {"val/psnr": values[unit.configuration]})
    return state


def leave_strip(plan: Plan, number: int, training: str, *levels: int, place: int = 0) -> Path:
    """The strip of a finished training: an image of each gray level."""
    white = np.full((48, 4, 3), 255, np.uint8)
    parts = [part for level in levels for part in (np.full((48, 64, 3), level, np.uint8), white)]
    file = plan.trial_folder(number, training) / strip_file(place)
    file.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(file, np.concatenate(parts[:-1], axis=1))
    return file


def labels(chart: Chart) -> dict[str, list[str]]:
    """What the images of each scene are called."""
    figures = re.findall(r"<figcaption>(.*?)</figcaption>(.*?)</figure>", chart.html, re.DOTALL)
    return {title: re.findall(r'alt="(.*?)"', images) for title, images in figures}


def test_each_scene_shows_stage_1_best_runner_up_and_photograph(
    tiny_plan: Callable[..., Plan],
):
    plan = tiny_plan("arcade,blinds", trials=3, stopping={"rule": "none"})
    state = finish(plan, [20.0, 22.0, 21.0])
    assert list(study_gallery(state)) == []  # nothing was kept
    for scene, photograph in (("arcade", 100), ("blinds", 102)):
        leave_strip(plan, 1, scene, photograph, 90, 99)
        lost = leave_strip(plan, 2, scene, photograph, 90, 95)
        leave_strip(plan, 0, scene, photograph, 90, 80)
    lost.unlink()
    (chart,) = study_gallery(state)
    assert labels(chart) == {
        "arcade": ["stage 1, 28.13 dB", "best (number 1), 48.13 dB",
                   "runner-up (number 2), 34.15 dB", "photograph"],
        "blinds": ["stage 1, 26.55 dB", "best (number 1), 38.59 dB", "photograph"],
    }  # fmt: skip


def test_joint_scenes_have_a_strip_each(tiny_plan: Callable[..., Plan]):
    knobs = {"codebook.shared": True}
    plan = tiny_plan("arcade,blinds", trials=1, fixed=knobs, stopping={"rule": "none"})
    state = finish(plan, [20.0])
    leave_strip(plan, 0, "all", 100, 90, 99)
    leave_strip(plan, 0, "all", 100, 90, 98, place=1)
    (chart,) = study_gallery(state)
    assert [images[1] for images in labels(chart).values()] == [
        "best (number 0), 48.13 dB", "best (number 0), 42.11 dB",
    ]  # fmt: skip


def test_a_search_of_stage_1_shows_the_fields_that_it_compares(tiny_plan: Callable[..., Plan]):
    space = {"field.optim.lr": {"low": 1e-3, "high": 1e-1}}
    plan = tiny_plan("arcade", method="nerf", trials=2, stopping={"rule": "none"}, space=space)
    state = finish(plan, [20.0, 19.0])
    for number, level in ((0, 99), (1, 98)):
        leave_strip(plan, number, "arcade", 100, level)
    (chart,) = study_gallery(state)
    names = ["best (number 0), 48.13 dB", "runner-up (number 1), 42.11 dB", "photograph"]
    assert labels(chart) == {"arcade": names}

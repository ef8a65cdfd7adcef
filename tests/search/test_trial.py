"""What one unit of a study trains, without Ray around it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cbnerf.search.ledger import Ledger
from cbnerf.search.plan import Plan
from cbnerf.search.trial import _run_unit, score_best

pytestmark = pytest.mark.search


def test_scenes_that_share_a_codebook_are_trained_once_and_each_is_scored(
    tiny_plan: Callable[..., Plan],
):
    knobs = {"codebook.shared": True, "field.optim.steps": 4, "refiner.optim.steps": 4}
    plan = tiny_plan("arcade,blinds", trials=1, fixed=knobs, stopping={"rule": "none"})
    ledger = Ledger(plan)
    unit = ledger.next_unit()
    assert unit is not None and unit.scene == "all" and ledger.next_unit() is None
    told: list[dict[str, Any]] = []
    _run_unit(plan, 0, unit, torch.device("cpu"), told.append)
    ledger.book(unit, {k: v for k, v in told[-1].items() if k.startswith("val/")})
    best = ledger.best()
    assert ledger.is_over and best is not None
    assert len(list(plan.cache.folder.glob("field-*"))) == 2
    scores = [score_best(plan, plan.base, unit.configuration, scene) for scene in plan.scenes]
    mean = sum(score["refined"]["val/psnr"] for score in scores) / 2
    assert mean == pytest.approx(best.value) and mean == pytest.approx(told[-1]["val/psnr"])

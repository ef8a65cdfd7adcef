"""How much of a GPU a training is given, from numbers that a GPU would have told."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cbnerf.data.renders import Renders, save_renders
from cbnerf.search import estimate
from cbnerf.search.estimate import bytes_needed, largest, measure_share, part_of_gpu
from cbnerf.search.plan import Plan

pytestmark = pytest.mark.search


@pytest.mark.parametrize(
    ("share", "part"),
    [(0.01, 1 / 4), (0.2, 1 / 4), (0.22, 1 / 3), (0.27, 1 / 3), (0.3, 1 / 2), (0.41, 1 / 2),
     (0.45, 1), (0.9, 1), (1.5, 1)],
)  # fmt: skip
def test_trainings_that_share_a_gpu_fit_into_it_with_room_to_spare(share: float, part: float):
    assert part_of_gpu(share) == part
    assert share > 0.5 or share / part <= 1 / 1.2


def test_the_renders_of_a_view_take_the_space_of_their_file(
    tiny_plan: Callable[..., Plan], tmp_path: Path
):
    plan = tiny_plan()
    one, two = (bytes_needed(plan, {"arcade": 9, "blinds": count}) for count in (1, 2))
    height, width = 48, plan.base.data.width
    colours = torch.zeros(1, height, width, 3, dtype=torch.uint8)
    save_renders(Renders(colours, colours.half()), tmp_path / "renders.npz")
    size = (tmp_path / "renders.npz").stat().st_size
    assert (two - one) / 2 == pytest.approx(size, rel=0.03)  # one for MLflow


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU to measure")
def test_without_a_gpu_nothing_is_measured(tiny_plan: Callable[..., Plan]):
    assert measure_share(tiny_plan(), ["field", "refiner"]) is None


def test_the_largest_values_of_the_space_are_measured(tiny_plan: Callable[..., Plan]):
    config = largest(tiny_plan())
    assert (config.codebook.size, config.codebook.beta) == (1024, 2.0)
    kind = {"codebook.imitation": {"choices": ["vq", "feature"]}}
    assert largest(tiny_plan(space=kind)) == tiny_plan(space=kind).base


def test_both_stages_are_tried_before_memory_is_read(
    tiny_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    done = ["nothing"]
    for stage in ("field", "refiner"):
        train = getattr(estimate, f"train_{stage}")

        def note(*arguments, stage=stage, train=train, **about):
            model = train(*arguments, **about)
            done.append(stage)
            return model

        monkeypatch.setattr(estimate, f"train_{stage}", note)
    monkeypatch.setattr(estimate, "gpu_share", lambda: {1: 0.1, 2: 0.3, 3: 0.6}[len(done)])
    assert measure_share(tiny_plan(), ["field"]) == 0.3
    assert measure_share(tiny_plan(), ["refiner"]) == 0.6 and done[1:] == ["field", "refiner"]

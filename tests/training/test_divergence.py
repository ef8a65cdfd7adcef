"""Divergence to finite numbers is told; trainings that are short or slow are left alone."""

from collections.abc import Callable

import pytest
import torch

from cbnerf.cli import main
from cbnerf.data.scene import Scene
from cbnerf.overrides import with_overrides
from cbnerf.presets import preset
from cbnerf.training.divergence import DivergenceCheck
from cbnerf.training.field import train_field
from cbnerf.training.stages import ignore

CPU = torch.device("cpu")


def make_check(errors: list[float], of_mean_colour: float) -> Callable[[], None]:
    values = iter(errors)
    return DivergenceCheck(lambda: torch.tensor(next(values)), torch.tensor(of_mean_colour))


def test_an_error_beyond_the_untrained_one_and_that_of_one_colour_is_told():
    check = make_check([0.04, 0.05, 0.2], 0.03)
    check()
    with pytest.raises(FloatingPointError) as error:
        check()
    # -10 log10 of 0.2, 0.04 and 0.03
    assert str(error.value) == (
        "field: diverged to a PSNR of 7.0 dB on training pixels; untrained it has 14.0 dB, their "
        "mean colour 15.2 dB; lower field.optim.lr"
    )
    with pytest.raises(FloatingPointError, match="a PSNR of nan dB"):
        make_check([0.04, float("nan")], 0.03)()


@pytest.mark.parametrize(
    "errors, of_mean_colour",
    [
        ([0.1, 0.09], 0.03),  # not yet as good as one colour
        ([0.01, 0.03], 0.03),  # begun from the very picture
        ([0.1, 0.1], 0.0),  # photographs of one colour
        ([0.1, 0.0], 0.0),
    ],
)
def test_what_has_not_come_far_has_not_diverged(errors: list[float], of_mean_colour: float):
    make_check(errors, of_mean_colour)()


@pytest.mark.parametrize("method", ["cb-nerf", "nerf-sr"])
@pytest.mark.parametrize("knobs", [{}, {"field.optim.lr": 1e-9}, {"field.optim.lr": 0.2}])
def test_short_and_slow_trainings_end_as_they_should(method: str, knobs, tiny_scene: Scene):
    if method == "nerf-sr" and knobs.get("field.optim.lr") == 0.2:
        knobs = {"field.optim.lr": 5e-3}  # ten times its own, as 0.2 is the end of stage1.yaml
    config = with_overrides(preset(method, "tiny"), knobs)
    for part in (20, 1):  # of 20 steps
        train_field(config, tiny_scene, device=CPU, report=ignore, part=part)


@pytest.mark.parametrize("rate", [1e2, 1e6])
def test_a_huge_learning_rate_ends_in_one_line(rate: float, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train-field", "--scene", "mosaic", "--output", str(tmp_path / "field"),
              "--resolution", "tiny", "--field.optim.lr", str(rate)])  # fmt: skip
    told = capsys.readouterr().err
    assert stop.value.code == 2 and told.count("\n") == 1
    assert told.startswith("cbnerf: field: diverged to a PSNR of")
    assert not (tmp_path / "field" / "metrics.json").exists()

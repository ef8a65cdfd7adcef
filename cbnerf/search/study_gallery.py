"""The pictures of a study: a held-out view of each scene by the best configuration and its rival.

They are read from the image strips that finished trainings write into the study's folder;
photographs, checkpoints and Ray are not needed.
"""

from collections.abc import Iterator

from jaxtyping import UInt8
from torch import Tensor

from cbnerf.metrics import psnr
from cbnerf.report.gallery import PHOTOGRAPH, Shot, View, gallery
from cbnerf.report.page import Chart
from cbnerf.search.state import StudyState
from cbnerf.training.stages import read_strip, strip_file

_CAPTION = (
    "The first validation view of each scene. No training has seen it; the validation views select "
    "the best configuration."
)


def study_gallery(state: StudyState) -> Iterator[Chart]:
    """The gallery; nothing if no configuration has written a strip."""
    views = [View(scene, shots) for scene in state.plan.scenes if (shots := _shots(state, scene))]
    if views:
        yield gallery(_CAPTION, views)


def _shots(state: StudyState, scene: str) -> list[Shot]:
    """Stage 1, best, runner-up and photograph, as far as they exist; empty without the best."""
    found = [(number, _read(state, number, scene)) for number in state.ranking()[:2]]
    if not found or found[0][1] is None:
        return []
    photograph, *stages = found[0][1]
    shots = [_shot("stage 1", stages[0], photograph)] if len(stages) > 1 else []
    for name, (number, images) in zip(("best", "runner-up"), found, strict=False):
        if images is not None:
            shots.append(_shot(f"{name} (number {number})", images[-1], photograph))
    return [*shots, Shot(PHOTOGRAPH, "", photograph)]


def _read(
    state: StudyState, number: int, scene: str
) -> list[UInt8[Tensor, "height width 3"]] | None:
    """Photograph, stage 1 and, of stage 2, the refined view of a configuration."""
    plan = state.plan
    training = plan.training_of(scene, plan.base)
    place = plan.scenes_of(training).index(scene)
    file = plan.trial_folder(number, training) / strip_file(place)
    return read_strip(file, 3 if plan.stage == "refiner" else 2)


def _shot(
    name: str, image: UInt8[Tensor, "height width 3"], photograph: UInt8[Tensor, "height width 3"]
) -> Shot:
    return Shot(name, f"{psnr(image, photograph):.2f} dB", image)

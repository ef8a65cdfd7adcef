"""The best configuration of a study as a model of MLflow: it renders a view and refines it.

MLflow runs this file to load the model ("models from code"); the package must be installed there.
"""

import json
from pathlib import Path
from typing import Any

import imageio.v3 as iio
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel
from pydantic import BaseModel

from cbnerf.search.champion import ARTIFACT, INDEX_FILE
from cbnerf.training.distributed import choose_device
from cbnerf.training.evaluation import refine_views, render_views
from cbnerf.training.models import load_field, load_refiner


class View(BaseModel):
    scene: str
    view: int
    """Index of a view of the scene, from 0."""


class Champion(PythonModel):
    def load_context(self, context: Any) -> None:
        self._folder = Path(context.artifacts[ARTIFACT])
        self._files = json.loads((self._folder / INDEX_FILE).read_text(encoding="utf-8"))

    def predict(self, model_input: list[View]) -> list[bytes]:
        """The refined views as PNG files; those of stage 1 where there is no stage 2.

        ValueError for a scene or a view that the study does not have.
        """
        return [self._draw(one.scene, one.view) for one in model_input]

    def _draw(self, scene: str, view: int) -> bytes:
        if scene not in self._files:
            raise ValueError(f"no scene {scene!r}; choose from {', '.join(self._files)}")
        paths, device = self._files[scene], choose_device()
        field, cameras, config = load_field(self._folder / paths["field"], device)
        num_views = len(cameras.camera_to_world)
        if not 0 <= view < num_views:
            raise ValueError(f"{scene}: no view {view}; it has 0 to {num_views - 1}")
        renders = render_views(field, cameras, [view], config.data.scale)
        image = renders.rgb[0]
        if "refiner" in paths:
            refiner = load_refiner(self._folder / paths["refiner"], device)
            image = refine_views(refiner, renders, device)[0]
        return iio.imwrite("<bytes>", image.numpy(), extension=".png")


set_model(Champion())

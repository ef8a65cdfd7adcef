"""The photographs of a scene as MLflow's dataset inputs: one for each part of its views."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from mlflow.entities import Dataset, DatasetInput, InputTag

from cbnerf.config import DataConfig
from cbnerf.data.captures import find_photographs, fingerprint
from cbnerf.data.splits import split_views
from cbnerf.search.plan import Plan

_CONTEXT = "mlflow.data.context"
TRAINING, SCORING = ("train", "val"), ("val", "test")
"""Views that a configuration is trained and evaluated on; views that the report scores."""


def scene_inputs(plan: Plan, training: str, contexts: tuple[str, ...]) -> list[DatasetInput]:
    """The views of the scenes of a training in these contexts; photographs that this machine cannot
    read are left out."""
    inputs = []
    for scene in plan.scenes_of(training):
        folder = plan.scene_folder(scene, plan.base.data.width)
        for context, digest, views in _parts(folder, plan.base.data):
            if context in contexts:
                source, profile = json.dumps({"uri": str(folder)}), json.dumps({"views": views})
                dataset = Dataset(scene, digest, "local", source, profile=profile)
                inputs.append(DatasetInput(dataset, [InputTag(_CONTEXT, context)]))
    return inputs


@lru_cache(maxsize=256)  # hashing all photographs takes a while
def _parts(folder: Path, data: DataConfig) -> tuple[tuple[str, str, int], ...]:
    """Context, digest and number of views of each part that is not empty."""
    try:
        photographs = fingerprint(folder, data.width)
        num_views = len(find_photographs(folder, data.width).files)
    except (OSError, ValueError):
        return ()
    parts = split_views(num_views, data)._asdict()
    return tuple(
        (context, hashlib.sha256(f"{photographs} {views}".encode()).hexdigest()[:8], len(views))
        for context, views in parts.items()
        if views
    )

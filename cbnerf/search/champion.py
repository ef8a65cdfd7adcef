"""Register the best configuration of a study as a model of MLflow, under the alias `champion`."""

import json
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from mlflow import MlflowClient, pyfunc
from mlflow.exceptions import MlflowException

from cbnerf.overrides import with_overrides
from cbnerf.search.plan import Plan
from cbnerf.search.state import StudyState
from cbnerf.training.checkpoint import FIELD_FILE, REFINER_FILE, Stage, save_weights

ALIAS = "champion"
ARTIFACT, INDEX_FILE = "scenes", "index.json"
"""The model's artifact: a folder with checkpoints, and the file with their paths by scene."""
_PART, _EXISTS = "model", "RESOURCE_ALREADY_EXISTS"
_REQUIREMENTS = ["mlflow", "torch"]
"""Packages besides cbnerf itself, which is on no package index."""


def model_name(plan: Plan) -> str:
    """The study's name, as far as MLflow allows."""
    return plan.name.replace(":", "-")


def register_champion(
    client: MlflowClient, state: StudyState, number: int, run_id: str
) -> str | None:
    """Log a configuration's model to its run and give it the alias, unless it has it already.

    Returns the address of the model. Registers nothing and returns None if the refiner needs a
    high-res photograph, or a checkpoint has been removed.
    """
    name = model_name(state.plan)
    tags = {"cbnerf.study_id": state.id, "cbnerf.configuration": str(number)}
    with suppress(MlflowException):  # There is none yet.
        if client.get_model_version_by_alias(name, ALIAS).tags.items() >= tags.items():
            return f"models:/{name}@{ALIAS}"
    with TemporaryDirectory() as temporary:
        scenes = Path(temporary) / ARTIFACT
        if not _collect(state, number, scenes):
            return None
        folder = Path(temporary) / _PART
        pyfunc.save_model(
            folder,
            python_model=str(Path(__file__).with_name("champion_model.py")),
            artifacts={ARTIFACT: str(scenes)},
            pip_requirements=_REQUIREMENTS,
        )
        client.log_artifacts(run_id, str(folder), _PART)
    try:
        client.create_registered_model(name, description=f"Study {state.plan.name} of cbnerf")
    except MlflowException as error:
        if error.error_code != _EXISTS:
            raise
    source = f"{client.get_run(run_id).info.artifact_uri}/{_PART}"
    version = client.create_model_version(name, source, run_id, tags=tags)
    client.set_registered_model_alias(name, ALIAS, version.version)
    return f"models:/{name}@{ALIAS}"


def _collect(state: StudyState, number: int, folder: Path) -> bool:
    """Copy the weights of all scenes to a folder, with their index; False if some are missing."""
    plan, trial = state.plan, state.study.get_trials(deepcopy=False)[number]
    config = with_overrides(plan.base, trial.params)
    if config.refiner.kind == "reference":
        return False
    index: dict[str, dict[str, str]] = {}
    for place, scene in enumerate(plan.scenes):
        trained = plan.trial_folder(number, plan.training_of(scene, config))
        field = trained if plan.stage == "field" else plan.field_folder(config, scene)
        files: dict[Stage, Path] = {"field": field / FIELD_FILE}
        if plan.stage == "refiner":
            files["refiner"] = trained / REFINER_FILE
        if not all(file.exists() for file in files.values()):
            return False
        (folder / str(place)).mkdir(parents=True)
        index[scene] = {stage: f"{place}/{file.name}" for stage, file in files.items()}
        for stage, file in files.items():
            save_weights(file, stage, folder / index[scene][stage])
    (folder / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")
    return True

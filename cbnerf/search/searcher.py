"""Who is tried next: Optuna proposes configurations, Tune gets them scene by scene.

The Optuna study is the only state of a search. Results of finished units stand in its user
attributes, so a killed search goes on from there, whatever Tune remembers.
"""

import math
import uuid
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from cbnerf.config import flatten
from cbnerf.search.plan import Plan
from cbnerf.search.spec import Choices


class Unit(NamedTuple):
    """One configuration on one scene."""

    configuration: int
    """Number of the Optuna trial."""
    scene: str
    overrides: dict[str, Any]


class Ledger:
    """Hands out units and books their results; knows Optuna, not Ray."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.study = open_study(plan)
        self._queue: list[Unit] = []
        self._results: dict[int, dict[str, dict[str, float] | None]] = {}
        booked = self.study.user_attrs
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state == TrialState.WAITING:
                continue
            keys = {scene: _key(trial.number, scene) for scene in plan.scenes}
            self._results[trial.number] = {s: booked[k] for s, k in keys.items() if k in booked}
            if trial.state == TrialState.RUNNING:
                # A search killed while it asked has stored some of the knobs; the rest comes now.
                # Optuna has no public way to go on with a trial it has handed out.
                self._enqueue(optuna.Trial(self.study, trial._trial_id))
                self._tell_if_complete(trial.number)

    def next_unit(self) -> Unit | None:
        """The next unit to run, or None when all have been handed out."""
        if not self._queue and len(self._results) < self.plan.spec.trials:
            trial = self.study.ask()
            self._results[trial.number] = {}
            self._enqueue(trial)
        return self._queue.pop(0) if self._queue else None

    def book(self, unit: Unit, metrics: dict[str, float] | None) -> None:
        """Record a unit's metrics, None for a failure; tell Optuna when a configuration is done."""
        if metrics is not None and not math.isfinite(metrics[self.plan.spec.metric]):
            metrics = None
        self.study.set_user_attr(_key(unit.configuration, unit.scene), metrics)
        self._results[unit.configuration][unit.scene] = metrics
        self._tell_if_complete(unit.configuration)

    def results(self, configuration: int) -> dict[str, dict[str, float] | None]:
        """Metrics by scene of the units finished so far."""
        return self._results[configuration]

    @property
    def id(self) -> str:
        """Tells the study from another one of the same name, made after this one was deleted."""
        return self.study.user_attrs["id"]

    @property
    def num_booked(self) -> int:
        return sum(len(results) for results in self._results.values())

    def best(self) -> FrozenTrial | None:
        """The completed configuration with the highest mean metric."""
        complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return max(complete, key=lambda trial: trial.value or 0, default=None)

    def _enqueue(self, trial: optuna.Trial) -> None:
        space, done = self.plan.spec.space, self._results[trial.number]
        overrides = {name: _suggest(trial, name, domain) for name, domain in space.items()}
        self._queue += [
            Unit(trial.number, scene, overrides) for scene in self.plan.scenes if scene not in done
        ]

    def _tell_if_complete(self, number: int) -> None:
        results = self._results[number]
        if len(results) < len(self.plan.scenes):
            return
        values = [metrics[self.plan.spec.metric] for metrics in results.values() if metrics]
        if len(values) < len(results):
            self.study.tell(number, state=TrialState.FAIL)
        else:
            self.study.tell(number, sum(values) / len(values))


Ended = Callable[[Unit, dict[str, float] | None], None]
"""Books a unit that has ended; no metrics mean that it failed."""


class TuneSearcher(Searcher):
    """Tune's view of a ledger."""

    def __init__(self, ledger: Ledger, ended: Ended):
        super().__init__()  # Given a metric, Tune would end the study at a unit without it.
        self._ledger = ledger
        self._ended = ended
        self._live: dict[str, Unit] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "TuneSearcher":
        return self  # Tune copies searchers; there is only one study.

    def suggest(self, trial_id: str) -> dict[str, Any] | Literal["FINISHED"]:
        unit = self._ledger.next_unit()
        if unit is None:
            return Searcher.FINISHED  # type: ignore[return-value]
        self._live[trial_id] = unit
        return unit._asdict()

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        failed = error or not result or "failure" in result
        self._ended(self._live[trial_id], None if failed else unit_metrics(result or {}))

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the study is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: the study is the state."""


def unit_metrics(result: dict[str, Any]) -> dict[str, float]:
    """Our own metrics out of all that Tune adds to a result."""
    own = ("train/", "val/", "codebook/")
    return {k: float(v) for k, v in result.items() if k.startswith(own) or k == "seconds"}


def open_study(plan: Plan) -> optuna.Study:
    """The study's journal in its folder, created with the points to try first."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    backend = JournalFileBackend(str(plan.folder / "optuna.journal"))
    study = optuna.create_study(
        study_name=plan.name,
        storage=optuna.storages.JournalStorage(backend),
        direction="maximize",
        load_if_exists=True,
    )
    num_known = len(study.get_trials(deepcopy=False))
    # A restarted sampler must not draw the numbers of its first life again.
    study.sampler = optuna.samplers.TPESampler(
        seed=plan.spec.seed + num_known, n_startup_trials=max(4, plan.spec.trials // 4)
    )
    for point in initial_points(plan):
        study.enqueue_trial(point, skip_if_exists=True)
    if "id" not in study.user_attrs:
        study.set_user_attr("id", uuid.uuid4().hex)
    return study


def initial_points(plan: Plan) -> list[dict[str, Any]]:
    """The preset's own values where they lie in the space, then the points of the YAML file."""
    defaults = {
        name: value
        for name, value in flatten(plan.base).items()
        if name in plan.spec.space and value in plan.spec.space[name]
    }
    points = [defaults] + [defaults | dict(point) for point in plan.spec.initial]
    return [point for index, point in enumerate(points) if point not in points[:index]]


def _suggest(trial: optuna.Trial, name: str, domain: Any) -> Any:
    if isinstance(domain, Choices):
        return trial.suggest_categorical(name, domain.choices)
    if isinstance(domain.low, int):
        step = int(domain.step or 1)
        return trial.suggest_int(name, domain.low, int(domain.high), step=step, log=domain.log)
    return trial.suggest_float(name, domain.low, domain.high, step=domain.step, log=domain.log)


def _key(configuration: int, scene: str) -> str:
    return f"{configuration}/{scene}"

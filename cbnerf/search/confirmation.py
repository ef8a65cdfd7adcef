"""The leaders of a search, trained again with other seeds, to choose among near-equal ones.

The metrics are stored in a user attribute of the study, by unit and seed.
"""

from collections.abc import Sequence
from statistics import fmean

import optuna

from cbnerf.search.plan import Plan, Unit
from cbnerf.search.racing import Metrics

LEADERS = 3
"""Number of configurations that are trained again."""
_ATTRIBUTE = "confirmations"


class Confirmation:
    """Full trainings of configurations with seeds other than that of the search.

    `leaders` are the best configurations of the search, which change when it is extended.
    """

    def __init__(self, plan: Plan, study: optuna.Study):
        self._plan, self._study = plan, study
        self._results: dict[str, Metrics | None] = study.user_attrs.get(_ATTRIBUTE, {})

    def missing(self, leaders: Sequence[int], num_seeds: int) -> list[tuple[Unit, int]]:
        """The trainings that are missing until each leader has `num_seeds` other seeds."""
        first = self._plan.base.seed + 1
        trials = self._study.get_trials(deepcopy=False)
        units = [
            Unit(number, scene, self._plan.rungs - 1, trials[number].params)
            for number in leaders
            for scene in self._plan.trainings
        ]
        seeds = range(first, first + num_seeds)
        return [
            (unit, seed)
            for unit in units
            for seed in seeds
            if _key(unit.configuration, unit.scene, seed) not in self._results
        ]

    def record(self, unit: Unit, seed: int, metrics: Metrics | None) -> None:
        """Store the metrics of a training; None if it failed."""
        self._results = self._results | {_key(unit.configuration, unit.scene, seed): metrics}
        self._study.set_user_attr(_ATTRIBUTE, self._results)

    def seeds(self, leaders: Sequence[int]) -> list[int]:
        """The seeds with which all leaders were trained again on all scenes."""
        found = sorted({int(key.rpartition("/")[2]) for key in self._results})
        pairs = [(number, scene) for number in leaders for scene in self._plan.trainings]
        return [s for s in found if all(_key(*pair, s) in self._results for pair in pairs)]

    def means(self, leaders: Sequence[int]) -> dict[int, dict[str, float]]:
        """The first objective of the leaders by scene, averaged over `seeds`; without leaders whose
        training failed, and empty without a seed."""
        seeds, first = self.seeds(leaders), self._plan.spec.objectives[0]
        means: dict[int, dict[str, float]] = {}
        for number in leaders if seeds else ():
            results = {
                scene: [self._results[_key(number, scene, seed)] for seed in seeds]
                for scene in self._plan.trainings
            }
            if all(None not in metrics for metrics in results.values()):
                means[number] = {
                    scene: fmean(m[first] for m in metrics if m)
                    for scene, metrics in results.items()
                }
        return means


def _key(number: int, scene: str, seed: int) -> str:
    return f"{number}/{scene}/{seed}"

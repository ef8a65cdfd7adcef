"""Tune's view of a search: a Tune trial trains one unit, or several one after the other.

The state decides, Tune places and restarts. Neither trusts the other's memory: what a search keeps
stands in the Optuna study alone.
"""

from collections.abc import Callable
from typing import Any, Literal

from ray.tune.search import Searcher

from cbnerf.search.plan import Unit
from cbnerf.search.racing import Metrics
from cbnerf.search.state import StudyState

Ended = Callable[[Unit, Metrics | None], None]
"""Books a unit that has ended; no metrics mean that it failed."""


class TuneSearcher(Searcher):
    """Hands the state's units to Tune as `{"units": [...]}` and books what it hears of them."""

    def __init__(
        self, state: StudyState, ended: Ended, *, limit: Callable[[], int], walk: bool = False
    ):
        """At most `limit()` trials are under way or wait for room, at any time. With `walk` a trial
        goes through all scenes of a rung, else it has one unit."""
        super().__init__()  # Given a metric, Tune would end the study at a unit without it.
        self._state = state
        self._ended = ended
        self._limit = limit
        self._walk = walk
        self._units: dict[str, list[Unit]] = {}
        self._ended_units: dict[str, set[int]] = {}
        self._processes: dict[str, tuple[int, str]] = {}
        """Number and address of the process of a trial, once it has been heard of."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "TuneSearcher":
        return self  # Tune copies searchers; there is only one study.

    def suggest(self, trial_id: str) -> dict[str, Any] | Literal["FINISHED"] | None:  # type: ignore[override]
        units = self._next() if len(self._units) < self._limit() else []
        if not units:
            return Searcher.FINISHED if self._state.is_over else None  # type: ignore[return-value]
        self._units[trial_id], self._ended_units[trial_id] = units, set()
        return {"units": [unit._asdict() for unit in units]}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if "begun" in result:
            self._processes[trial_id] = result["pid"], result["node_ip"]
        # Once for each unit, however often it is told: a restarted trial tells again.
        if result.get("ended") and result["unit"] not in self._ended_units[trial_id]:
            self._ended_units[trial_id].add(result["unit"])
            self._ended(self._units[trial_id][result["unit"]], unit_metrics(result))

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if result:
            self.on_trial_result(trial_id, result)
        ended = self._ended_units.pop(trial_id)
        self._processes.pop(trial_id, None)
        for index, unit in enumerate(self._units.pop(trial_id)):
            if index not in ended:
                self._ended(unit, None)

    def left(self, trouble: str) -> tuple[list[Unit], list[Unit]]:
        """Of the units that have not ended those of the processes that an error of Ray names (or,
        where it names none that is known, all of them), and the others."""
        named, others = [], []
        for trial_id, units in self._units.items():
            ended, process = self._ended_units[trial_id], self._processes.get(trial_id)
            is_named = process and f"pid={process[0]}," in trouble and process[1] in trouble
            left = [unit for index, unit in enumerate(units) if index not in ended]
            (named if is_named else others).extend(left)
        return (named, others) if named else (others, [])

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the study is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: the study is the state."""

    def _next(self) -> list[Unit]:
        if self._walk:
            return self._state.next_walk()
        unit = self._state.next_unit()
        return [unit] if unit else []


def unit_metrics(result: dict[str, Any]) -> Metrics:
    """Our own metrics out of all that Tune adds to a result."""
    own, exact = ("train/", "val/", "codebook/"), ("seconds", "parameters")
    return {k: float(v) for k, v in result.items() if k.startswith(own) or k in exact}

"""Ray Tune's interface to a search: a Tune trial trains one unit, or several in a row.

`TuneSearcher` hands the units of the state to Tune, `Recorder` records how they end. Nothing is
restored from Tune: the Optuna study is the only persistent state.
"""

import errno
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from ray import tune
from ray.tune.search import Searcher
from tqdm import tqdm

from cbnerf.search.curves import reserve_curves
from cbnerf.search.plan import Unit
from cbnerf.search.racing import Metrics
from cbnerf.search.sizes import searched_sizes
from cbnerf.search.state import StudyState
from cbnerf.search.tasks import is_of_memory, reason

_MAX_LOSSES = 5
"""A unit that loses its process before it begins is handed out again this many times."""


class TuneSearcher(Searcher):
    """Suggests the units of a state to Tune as `{"units": [...]}` and reports their ends."""

    def __init__(
        self,
        state: StudyState,
        end_unit: Callable[[Unit, Metrics | None], None],
        *,
        limit: Callable[[], int],
        walk: bool = False,
    ):
        """Calls `end_unit` for each unit that has ended, without metrics if it has failed.

        At most `limit()` trials run or wait for resources at any time. With `walk` a trial trains
        all scenes of a rung, else one unit.
        """
        super().__init__()  # Given a metric, Tune would end the study at a unit without it.
        self._state = state
        self._end_unit = end_unit
        self._limit = limit
        self._walk = walk
        self._units: dict[str, list[Unit]] = {}
        self._ended_units: dict[str, set[int]] = {}
        self._processes: dict[str, tuple[int, str]] = {}
        """Process id and IP address of each trial that has reported."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "TuneSearcher":
        return self  # Tune copies searchers; there is only one study.

    def suggest(self, trial_id: str) -> dict[str, Any] | Literal["FINISHED"] | None:  # type: ignore[override]
        units = self._next_units() if len(self._units) < self._limit() else []
        if not units:
            return Searcher.FINISHED if self._state.is_over else None  # type: ignore[return-value]
        for unit in units:
            reserve_curves(self._state.plan.trial_folder(unit.configuration, unit.scene))
        self._units[trial_id], self._ended_units[trial_id] = units, set()
        return {"units": [unit._asdict() for unit in units]}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if "begun" in result:
            self._processes[trial_id] = result["pid"], result["node_ip"]
        # Once for each unit: a restarted trial reports its ended units again.
        if result.get("ended") and result["unit"] not in self._ended_units[trial_id]:
            self._ended_units[trial_id].add(result["unit"])
            self._end_unit(self._units[trial_id][result["unit"]], _unit_metrics(result))

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if result:
            self.on_trial_result(trial_id, result)
        ended = self._ended_units.pop(trial_id)
        self._processes.pop(trial_id, None)
        for index, unit in enumerate(self._units.pop(trial_id)):
            if index not in ended:
                self._end_unit(unit, None)

    def unfinished(self, trouble: str) -> tuple[list[Unit], list[Unit]]:
        """The units that have not ended: those of the processes that an error of Ray names (all if
        it names none that is known), and the others."""
        named, others = [], []
        for trial_id, units in self._units.items():
            ended, process = self._ended_units[trial_id], self._processes.get(trial_id)
            is_named = process and f"pid={process[0]}," in trouble and process[1] in trouble
            left = [unit for index, unit in enumerate(units) if index not in ended]
            (named if is_named else others).extend(left)
        return (named, others) if named else (others, [])

    def was_alone(self, trouble: str) -> bool:
        """Whether an error of Ray names the only process of this study on its machine."""
        there = [pid for pid, address in self._processes.values() if address in trouble]
        return len(there) == 1 and f"pid={there[0]}," in trouble

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the study is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: the study is the state."""

    def _next_units(self) -> list[Unit]:
        if self._walk:
            return self._state.next_walk()
        unit = self._state.next_unit()
        return [unit] if unit else []


class Recorder(tune.Callback):
    """Records the ends of units in the state, retries lost ones, and shows the progress.

    Tune restarts a trial whose process dies, but not one whose process dies before it begins; the
    units of the latter are handed out again.
    """

    def __init__(self, state: StudyState, bar: "tqdm[Any]"):
        self._state = state
        self._bar = bar
        self._begun: set[str] = set()
        """Keys of the units whose process has started."""
        self._losses: Counter[str] = Counter()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles callbacks; this one is used on the driver only.

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._begun.update(unit.key for unit in _units(trial))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._begun.difference_update(unit.key for unit in _units(trial))
        self._check_disk()  # On a full disk a retry would fail, too.

    def _check_disk(self) -> None:
        """OSError for a full disk; its type survives where Tune raises it as its own error."""
        try:
            self._state.plan.check_disk()
        except ValueError as error:
            raise OSError(errno.ENOSPC, str(error)) from None

    # Tune calls the searcher first, so the units have been recorded.
    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if "failure" in trial.last_result:
            result = trial.last_result
            self._explain(
                _units(trial), result["failure"], of_memory=result.get("out_of_memory", False)
            )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # `trial.get_error` reads a copy in the storage, which Tune makes later.
        # Ray writes it in the encoding of the locale.
        trouble = Path(trial.error_file).read_text(encoding="utf-8", errors="replace")
        self._explain(_units(trial), reason(trouble), of_memory=is_of_memory(trouble))

    def end_unit(self, unit: Unit, metrics: Metrics | None) -> None:
        """Record a unit, or hand it out again if its process was lost before it began."""
        if metrics is None:
            self._check_disk()  # A full disk is no failure of the configuration.
            if unit.key not in self._begun:
                self._losses[unit.key] += 1
                if self._losses[unit.key] <= _MAX_LOSSES:
                    self._state.release(unit)
                    return
        before = self._state.num_ended
        self._state.record(unit, metrics)
        if self._state.num_ended > before:
            self._bar.update(self._state.num_ended - self._bar.n)
            self._bar.write(f"  #{unit.configuration:02d}  {self._describe(unit)}")

    def lose_unit(self, unit: Unit, why: str, *, again: bool) -> None:
        """A unit that Ray has ended for memory with all of Tune: handed out again, a few times at
        most, or failed."""
        if again:
            self._begun.discard(unit.key)
        else:
            self._begun.add(unit.key)
        self.end_unit(unit, None)
        if self._has_failed(unit):
            self._explain([unit], why, of_memory=True)
        else:
            self._bar.write(f"  #{unit.configuration:02d}  {unit.scene}: {why}")

    def _explain(self, units: list[Unit], why: str, *, of_memory: bool) -> None:
        why = " ".join(why.split())[-300:]
        if failed := [unit for unit in units if self._has_failed(unit)]:
            for unit in failed:
                self._state.explain(unit, why)
            number, scenes = failed[0].configuration, ", ".join(unit.scene for unit in failed)
            self._bar.write(f"  #{number:02d}  {scenes} failed: {why}")
            if of_memory and self._state.record_out_of_memory(failed[0]):
                self._bar.write(f"  #{number:02d}  ran out of memory: {self._skipped()}")

    def _skipped(self) -> str:
        sizes = ", ".join(searched_sizes(self._state.plan.spec.space))
        return f"configurations at least as large{sizes and f' in {sizes}'} are not trained"

    def _has_failed(self, unit: Unit) -> bool:
        results = self._state.results(unit.configuration)
        return results.get((unit.scene, unit.rung), {}) is None

    def _describe(self, unit: Unit) -> str:
        """The end of a unit's configuration and its knobs, in words."""
        best, pruned = self._state.best(), self._state.pruned.get(unit.configuration)
        trial = self._state.study.get_trials(deepcopy=False)[unit.configuration]
        if pruned is not None:
            end = f"stopped, {pruned.reason}"
        elif trial.values is None:
            end = "failed"
        else:
            end = " ".join(f"{value:.3f}" for value in trial.values)
        mark = " *" if best is not None and best.number == trial.number else ""
        knobs = " ".join(
            f"{name.split('.')[-1]}={setting:.3g}" if isinstance(setting, float)
            else f"{name.split('.')[-1]}={setting}"
            for name, setting in unit.overrides.items()
        )  # fmt: skip
        return f"{end}{mark}  {knobs}"


def _units(trial: Any) -> list[Unit]:
    """The units of a Tune trial."""
    return [Unit(**unit) for unit in trial.config["units"]]


def _unit_metrics(result: dict[str, Any]) -> Metrics:
    """The `metrics` that a worker reports; Tune flattens them into a result of its own."""
    own = "metrics/"
    return {k.removeprefix(own): float(v) for k, v in result.items() if k.startswith(own)}

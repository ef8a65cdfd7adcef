"""Searches on a fake objective in place of training."""

import math
from collections.abc import Callable

from optuna.trial import TrialState

from cbnerf.search.plan import Unit
from cbnerf.search.racing import Metrics
from cbnerf.search.state import StudyState

RACE = {"rule": "race", "rungs": 3, "grace_period": 1}


def beta_near_1(unit: Unit) -> Metrics:
    """The objective is highest where beta is 1."""
    psnr = 30 - math.log(unit.overrides["codebook.beta"]) ** 2 + len(unit.scene) + unit.rung
    return {"val/psnr": psnr, "seconds": 1.0}


def first_is_best(unit: Unit) -> Metrics:
    """The first configuration is best by a decibel, and it shows from the first rung on."""
    worse = unit.configuration > 0
    return {"val/psnr": 20.0 + unit.rung - worse + len(unit.scene) / 10, "seconds": 3.0**unit.rung}


def train_units(
    state: StudyState,
    score: Callable[[Unit], Metrics | None] = beta_near_1,
    most: int | None = None,
) -> list[Unit]:
    """Record the metrics of the next units (None: failed), of `most` or of all; returns them."""
    done: list[Unit] = []
    while (most is None or len(done) < most) and (unit := state.next_unit()):
        state.record(unit, score(unit))
        done.append(unit)
    return done


def trial_states(state: StudyState) -> list[TrialState]:
    """Optuna's state of each configuration."""
    return [trial.state for trial in state.study.get_trials()]

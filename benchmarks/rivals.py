"""Pruning rules that users of Ray Tune and Optuna have, driven by their own classes.

A rival prunes whole configurations: a configuration is one trial, which trains one scene after
another in a fixed order and reports after each of them. Its sampler and its rule see what they
would see in a real study; only the training is read from a table.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, NopPruner, WilcoxonPruner
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from ray.tune.schedulers import ASHAScheduler, TrialScheduler


class Rule(Protocol):
    """Decides after each scene whether a trial goes on."""

    @property
    def pruner(self) -> BasePruner:
        """Optuna's pruner, of which some samplers ask the brackets."""
        ...

    def keeps(self, trial: optuna.Trial, values: list[float]) -> bool:
        """Whether a trial with these values of its scenes so far goes on. Reports to the trial."""
        ...


class OptunaRule:
    """A pruner of Optuna; `paired` ones compare scenes, others the mean of the scenes so far."""

    def __init__(self, pruner: BasePruner, *, paired: bool = False):
        self.pruner = pruner
        self._paired = paired

    def keeps(self, trial: optuna.Trial, values: list[float]) -> bool:
        trial.report(values[-1] if self._paired else _mean(values), step=len(values) - self._paired)
        return not trial.should_prune()


class RayRule:
    """Ray's asynchronous successive halving of the mean of the scenes so far."""

    def __init__(self, scheduler: ASHAScheduler):
        self.pruner = NopPruner()
        self._scheduler = scheduler

    def keeps(self, trial: optuna.Trial, values: list[float]) -> bool:
        trial.report(_mean(values), step=len(values))
        # Of the controller ASHA needs nothing, of a trial its name.
        controller: Any = None
        tune_trial: Any = SimpleNamespace(trial_id=str(trial.number))
        if len(values) == 1:
            self._scheduler.on_trial_add(controller, tune_trial)
        result = {"scenes": len(values), "psnr": _mean(values)}
        decision = self._scheduler.on_trial_result(controller, tune_trial, result)
        return decision != TrialScheduler.STOP


class Rival(NamedTuple):
    """A sampler and a rule, made anew for each search of a number of scenes and a seed."""

    sampler: Callable[[int], BaseSampler]
    rule: Callable[[int], Rule]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _tpe(seed: int) -> TPESampler:
    return TPESampler(seed=seed)


def _gp(seed: int) -> GPSampler:
    return GPSampler(seed=seed, deterministic_objective=True)


def _asha(factor: float, grace_period: int = 1) -> Callable[[int], Rule]:
    return lambda scenes: RayRule(
        ASHAScheduler(
            time_attr="scenes", metric="psnr", mode="max", max_t=scenes,
            grace_period=grace_period, reduction_factor=factor, stop_last_trials=False,
        )
    )  # fmt: skip


def _hyperband(factor: int) -> Callable[[int], Rule]:
    return lambda scenes: OptunaRule(
        HyperbandPruner(min_resource=1, max_resource=scenes, reduction_factor=factor)
    )


def _wilcoxon(threshold: float) -> Callable[[int], Rule]:
    return lambda scenes: OptunaRule(WilcoxonPruner(p_threshold=threshold), paired=True)


def _nothing(scenes: int) -> Rule:
    return OptunaRule(NopPruner())


RIVALS = {
    "random": Rival(lambda seed: RandomSampler(seed=seed), _nothing),
    "TPE": Rival(_tpe, _nothing),
    "GP": Rival(_gp, _nothing),
    "TPE + Ray's ASHA, 2": Rival(_tpe, _asha(2)),
    "TPE + Ray's ASHA, 4": Rival(_tpe, _asha(4)),
    "TPE + Ray's ASHA, 2, from 2 scenes": Rival(_tpe, _asha(2, 2)),
    "TPE + Hyperband, 2": Rival(_tpe, _hyperband(2)),
    "TPE + Hyperband, 3": Rival(_tpe, _hyperband(3)),
    "TPE + Wilcoxon, p .05": Rival(_tpe, _wilcoxon(0.05)),
    "TPE + Wilcoxon, p .1": Rival(_tpe, _wilcoxon(0.1)),
    "TPE + Wilcoxon, p .26": Rival(_tpe, _wilcoxon(0.26)),
    "GP + Wilcoxon, p .26": Rival(_gp, _wilcoxon(0.26)),
}
"""All use the preset of their library but for the number after the rule's name."""

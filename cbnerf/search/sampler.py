"""The Optuna study of a search, and the sampler that proposes configurations."""

import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
from numpy.random import SeedSequence
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage
from optuna.trial import TrialState
from scipy.stats import loguniform, qmc

from cbnerf.config import KnobError
from cbnerf.files import drop_torn_line
from cbnerf.search.limits import is_within_limits, known_costs, preset_point
from cbnerf.search.plan import Plan
from cbnerf.search.spec import QUALITIES, Choices, Range


def open_study(plan: Plan) -> optuna.Study:
    """Open the study's journal for writing; a new one gets the initial points.

    Repairs a torn line and a stale lock, so no other process may write to it.
    """
    file = _journal_file(plan)
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        drop_torn_line(file)  # Optuna refuses a journal that holds one.
    lock = JournalFileOpenLock(str(file))
    with suppress(RuntimeError):  # Usually there is none.
        lock.release()
    return make_study(plan, _open_journal(file, lock))


def read_study(plan: Plan) -> optuna.Study:
    """Open the study's journal for reading, also while its driver writes.

    Changes nothing on the disk. Raises ValueError if the study has not begun.
    """
    file = _journal_file(plan)
    try:
        if file.exists():  # Optuna would create the file.
            return optuna.load_study(study_name=plan.name, storage=_open_journal(file))
    except KeyError:  # Its first line has not been written yet.
        pass
    raise ValueError(f"study {plan.name}: it has not begun yet")


def join_study(plan: Plan) -> optuna.Study:
    """Open the journal of a begun study for appending; its driver may write to it, too."""
    file = _journal_file(plan)
    storage = _open_journal(file, JournalFileOpenLock(str(file)))
    return optuna.load_study(study_name=plan.name, storage=storage)


def _journal_file(plan: Plan) -> Path:
    return plan.folder / "optuna.journal"


def _open_journal(file: Path, lock: JournalFileOpenLock | None = None) -> JournalStorage:
    try:
        return JournalStorage(JournalFileBackend(str(file), lock_obj=lock))
    except ValueError as error:
        raise ValueError(f"{file}: damaged ({error}); bring back a copy of it") from None


def make_study(plan: Plan, storage: optuna.storages.BaseStorage | None = None) -> optuna.Study:
    """The Optuna study of a plan; in memory without a storage."""
    study = optuna.create_study(
        study_name=plan.name,
        storage=storage,
        directions=[
            "maximize" if name in QUALITIES else "minimize" for name in plan.spec.objectives
        ],
        load_if_exists=True,
    )
    for point in initial_points(plan):
        study.enqueue_trial(point, skip_if_exists=True)
    if "id" not in study.user_attrs:
        study.set_user_attr("id", uuid.uuid4().hex)
    return study


def initial_points(plan: Plan) -> list[dict[str, Any]]:
    """The values of the preset that lie in the space, if no limit is exceeded, then the points of
    the YAML file."""
    defaults = preset_point(plan.base, plan.spec)
    points = [defaults | dict(point) for point in plan.spec.initial]
    if is_within_limits(plan.base, plan.spec, defaults):
        points.insert(0, defaults)
    return [p for index, p in enumerate(points) if p and p not in points[:index]]


def propose(plan: Plan, study: optuna.Study, number: int) -> optuna.Trial:
    """Ask for the configuration of a number: an initial point, a point of the quasi-random start,
    or a proposal of the sampler."""
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    num_ended = sum(state.is_finished() for state in states)
    starts = plan.spec.sampler == "sobol-tpe" and num_ended < _num_startup(plan)
    if starts and TrialState.WAITING not in states:
        study.enqueue_trial(quasi_random_point(plan, number))
    study.sampler = make_sampler(plan, number)
    return study.ask()


def end_unfit(
    plan: Plan, study: optuna.Study, trial: optuna.Trial, overrides: dict[str, Any]
) -> dict[str, float] | None:
    """The costs of a configuration that are known before it is trained; None if it must not be
    trained. It has then ended, as failed if its knobs are incompatible, as pruned beyond a limit.
    """
    try:
        costs = known_costs(plan.base, plan.spec, overrides)
    except KnobError:
        study.tell(trial.number, state=TrialState.FAIL)
        return None
    excess = {name: costs[name] - limit for name, limit in plan.spec.limits.items()}
    for name, value in excess.items():
        trial.set_constraint(name, value)
    if any(value > 0 for value in excess.values()):
        study.tell(trial.number, state=TrialState.PRUNED)
        return None
    return costs


def make_sampler(plan: Plan, number: int) -> optuna.samplers.BaseSampler:
    """The sampler of one configuration.

    Its proposal depends only on the seed, the number and the trials so far, so that a killed search
    continues as if it had not been interrupted.
    """
    seed = int(SeedSequence([plan.spec.seed, number]).generate_state(1)[0])
    if plan.spec.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=_num_startup(plan))


def quasi_random_point(plan: Plan, number: int) -> dict[str, Any]:
    """A point of a scrambled Sobol sequence, which covers the space evenly at any length."""
    sequence = qmc.Sobol(len(plan.spec.space), rng=plan.spec.seed)
    if number:
        sequence.fast_forward(number)
    (shares,) = sequence.random()
    return {
        name: _value_at(domain, float(share))
        for (name, domain), share in zip(plan.spec.space.items(), shares, strict=True)
    }


def _num_startup(plan: Plan) -> int:
    """Number of configurations that must have ended before TPE learns from them."""
    return min(max(4, plan.spec.trials // 4), 10)


def _value_at(domain: Range | Choices, share: float) -> Any:
    """The quantile of a domain at a share in [0, 1); uniform in the logarithm with `log`."""
    if isinstance(domain, Choices):
        return domain.choices[int(share * len(domain.choices))]
    is_integer = isinstance(domain.low, int)
    step = domain.step or (1 if is_integer and not domain.log else None)
    if step:
        num_values = int((domain.high - domain.low) / step + 1e-9) + 1
        return min(domain.low + step * int(share * num_values), domain.high)
    if domain.log:
        value = float(loguniform.ppf(share, domain.low, domain.high))
    else:
        value = domain.low + share * (domain.high - domain.low)
    return min(max(round(value) if is_integer else value, domain.low), domain.high)


def suggest(trial: optuna.Trial, plan: Plan) -> dict[str, Any]:
    """Suggest a value for each knob of the space."""
    return {name: _suggest(trial, name, domain) for name, domain in plan.spec.space.items()}


def _suggest(trial: optuna.Trial, name: str, domain: Any) -> Any:
    if isinstance(domain, Choices):
        return trial.suggest_categorical(name, domain.choices)
    if isinstance(domain.low, int):
        step = int(domain.step or 1)
        return trial.suggest_int(name, domain.low, int(domain.high), step=step, log=domain.log)
    return trial.suggest_float(name, domain.low, domain.high, step=domain.step, log=domain.log)

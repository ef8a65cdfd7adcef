"""Charts of a study: those of Optuna, the units of each configuration, and the cost."""

import warnings
from collections.abc import Iterator

import optuna.visualization as visualization
import plotly.graph_objects as go
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState
from plotly.io import to_html as chart_to_html

from cbnerf.report.page import Chart
from cbnerf.search.state import StudyState

_ENOUGH = 4
"""Number of finished or pruned configurations that a chart of importances needs."""


def charts(state: StudyState) -> Iterator[Chart]:
    """The charts of a study; the first one embeds plotly's script for all."""
    for index, (title, about, figure) in enumerate(_figures(state)):
        figure.update_layout(title=None, margin={"t": 30})
        html = chart_to_html(
            figure, full_html=False, include_plotlyjs=index == 0, div_id=f"chart-{index}"
        )
        yield Chart(title, about, html)


def _figures(state: StudyState) -> Iterator[tuple[str, str, go.Figure]]:
    """Title, a sentence and the chart."""
    study, objectives = state.study, state.plan.spec.objectives
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    for index, name in enumerate(objectives):
        # Without a target, which several objectives need, Optuna also draws the best so far.
        target = None if len(objectives) == 1 else lambda trial, i=index: trial.values[i]
        figure = visualization.plot_optimization_history(study, target=target, target_name=name)
        yield f"History of {name}", "Each configuration in the order of its number.", figure
    if len(objectives) in (2, 3):
        figure = visualization.plot_pareto_front(study, target_names=list(objectives))
        yield "Pareto front", "No configuration is better in all objectives.", figure
    if len(complete) >= _ENOUGH and len(state.plan.spec.space) > 1:
        first = objectives[0]
        # Optuna minimises a target; it knows the direction of a single objective.
        target = None if len(objectives) == 1 else lambda trial: -trial.values[0]
        figure = visualization.plot_parallel_coordinate(study, target=target, target_name=first)
        about = f"One line per configuration, the darker the better in {first}."
        yield "Parallel coordinates", about, figure
        about = "Share of each knob in what separates good configurations (PED-ANOVA)."
        yield "Importances", about, importances(state)
    yield "Race", "Units of each configuration, and what became of it.", _race(state)
    if state.field_seconds:
        about = "Training seconds: measured, and what the same configurations would have taken."
        yield "Cost", about, _cost(state)


def importances(state: StudyState) -> go.Figure:
    """PED-ANOVA importance of each knob, overall and, if scenes train separately, by scene."""
    figure = go.Figure()
    evaluator, first = PedAnovaImportanceEvaluator(), state.plan.spec.objectives[0]
    # PED-ANOVA minimises a target.
    targets = {"overall": lambda trial: -trial.values[0]}
    trainings = state.plan.trainings
    for scene in trainings if len(trainings) > 1 else ():
        targets[scene] = lambda trial, s=scene: -_value_on(state, trial, s, first)
    for name, target in targets.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # It warns that it minimises.
            shares = get_param_importances(state.study, evaluator=evaluator, target=target)
        visible = True if name == "overall" else "legendonly"
        bar = go.Bar(x=list(shares), y=list(shares.values()), name=name, visible=visible)
        figure.add_trace(bar)
    return figure


def _value_on(state: StudyState, trial: FrozenTrial, scene: str, quality: str) -> float:
    """The objective on one scene at the highest rung reached; the mean if it was not trained."""
    reached = [(rung, m) for (s, rung), m in state.results(trial.number).items() if s == scene]
    metrics = max(reached, key=lambda pair: pair[0], default=(0, None))[1]
    return metrics[quality] if metrics else trial.values[0]


def _race(state: StudyState) -> go.Figure:
    figure = go.Figure()
    trials = state.study.get_trials(deepcopy=False)
    for rung in range(state.plan.rungs):
        counts = {
            number: sum(r == rung for _, r in state.results(number)) for number in state.ended
        }
        ends = [state.describe_end(trials[number]) for number in counts]
        bar = go.Bar(x=list(counts), y=list(counts.values()), name=f"rung {rung}", hovertext=ends)
        figure.add_trace(bar)
    figure.update_layout(barmode="stack", xaxis_title="configuration", yaxis_title="units")
    return figure


def _cost(state: StudyState) -> go.Figure:
    fields = sum(state.field_seconds.values())
    whole, spent = [], 0.0
    for number in state.ended:
        last: dict[str, float] = {}
        for (scene, _), metrics in sorted(state.results(number).items(), key=lambda e: e[0][1]):
            if metrics:
                last[scene] = metrics.get("seconds", 0.0)  # of all rungs so far
        spent += sum(last.values())
        if number not in state.pruned:
            whole.append(sum(last.values()))
    each, count = sum(whole) / max(len(whole), 1), len(state.ended)
    bars = {
        "both stages, every scene": count * (fields + each),
        "stage 1 once": fields + count * each,
        "stage 1 once, race (measured)": fields + spent,
    }
    figure = go.Figure(go.Bar(x=list(bars.values()), y=list(bars), orientation="h"))
    figure.update_layout(xaxis_title="training seconds")
    return figure

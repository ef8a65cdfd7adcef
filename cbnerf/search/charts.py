"""Charts of a study: those of Optuna, the units of each configuration, and the cost."""

from collections.abc import Iterator, Sequence

import optuna.visualization as visualization
import plotly.graph_objects as go
from optuna.trial import TrialState
from plotly.io import to_html as chart_to_html

from cbnerf.report.page import Chart
from cbnerf.search.effects import ENOUGH, Effect
from cbnerf.search.spec import UNITS
from cbnerf.search.state import StudyState
from cbnerf.search.status import training_seconds


def charts(state: StudyState, effects: Sequence[Effect]) -> Iterator[Chart]:
    """The charts of a study and of the effects of its knobs; the first one embeds plotly's script
    for all."""
    for index, (title, about, figure) in enumerate(_figures(state, effects)):
        figure.update_layout(title=None, margin={"t": 30})
        html = chart_to_html(
            figure, full_html=False, include_plotlyjs=index == 0, div_id=f"chart-{index}"
        )
        yield Chart(title, about, html)


def _figures(state: StudyState, effects: Sequence[Effect]) -> Iterator[tuple[str, str, go.Figure]]:
    """Title, caption and figure of each chart."""
    study, objectives = state.study, state.plan.spec.objectives
    if effects:
        about = "Highest minus lowest mean over the searched range; grey: no effect is seen."
        yield "Effects", about, _effects(effects, objectives[0])
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    for index, name in enumerate(objectives):
        # Without a target, which several objectives need, Optuna also draws the best so far.
        target = None if len(objectives) == 1 else lambda trial, i=index: trial.values[i]
        figure = visualization.plot_optimization_history(study, target=target, target_name=name)
        yield f"History of {name}", "Each configuration in the order of its number.", figure
    if len(objectives) in (2, 3):
        figure = visualization.plot_pareto_front(study, target_names=list(objectives))
        yield "Pareto front", "No configuration is better in all objectives.", figure
    if len(complete) >= ENOUGH and len(state.plan.spec.space) > 1:
        first = objectives[0]
        # Optuna minimises a target; it knows the direction of a single objective.
        target = None if len(objectives) == 1 else lambda trial: -trial.values[0]
        figure = visualization.plot_parallel_coordinate(study, target=target, target_name=first)
        about = f"One line per configuration, the darker the better in {first}."
        yield "Parallel coordinates", about, figure
    yield "Race", "Trained units of each configuration, by rung.", _race(state)
    if state.field_seconds:
        about = "Training seconds: measured, and those of the same configurations without pruning."
        yield "Cost", about, _cost(state)


def _effects(effects: Sequence[Effect], quality: str) -> go.Figure:
    """Sizes with 95 % intervals, the largest on top; knobs without an effect are grey."""
    rows = effects[::-1]
    sizes = [effect.size for effect in rows]
    whiskers = {
        "symmetric": False,
        "array": [effect.high - effect.size for effect in rows],
        "arrayminus": [effect.size - effect.low for effect in rows],
    }
    colors = ["#1f77b4" if effect.is_seen else "#c4c4c4" for effect in rows]
    bar = go.Bar(
        x=sizes, y=[effect.knob for effect in rows], orientation="h", error_x=whiskers,
        marker_color=colors, hovertext=[effect.describe(quality) for effect in rows],
    )  # fmt: skip
    figure = go.Figure(bar)
    figure.update_layout(xaxis_title=UNITS[quality], height=120 + 36 * len(rows))
    figure.update_yaxes(automargin=True)
    return figure


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
    spent = {number: training_seconds(state, number) for number in state.ended}
    whole = [seconds for number, seconds in spent.items() if number not in state.pruned]
    each, count = sum(whole) / max(len(whole), 1), len(spent)
    bars = {
        "both stages, every scene": count * (fields + each),
        "stage 1 once": fields + count * each,
        "stage 1 once, race (measured)": fields + sum(spent.values()),
    }
    figure = go.Figure(go.Bar(x=list(bars.values()), y=list(bars), orientation="h"))
    figure.update_layout(xaxis_title="training seconds")
    return figure

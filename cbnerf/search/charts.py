"""The report of a study as one self-contained page: tables, Optuna's charts, race and cost."""

import warnings
from collections.abc import Iterator
from html import escape

import optuna.visualization as charts
import plotly.graph_objects as go
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState
from plotly.io import to_html as chart_to_html

from cbnerf.search.ledger import Ledger
from cbnerf.tables import STYLE, Table, to_html

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; }
pre { background: #f4f4f4; padding: 1em; overflow-x: auto; }
p { color: #444; }
.wide { overflow-x: auto; }
.wide td { white-space: nowrap; }
"""
_ENOUGH = 4
"""Finished or stopped configurations that a chart of importances needs."""


def html_report(
    ledger: Ledger,
    best_yaml: str,
    number: int,
    precision: str,
    scenes: Table,
    configurations: Table,
) -> str:
    """The whole page; plotly's script stands in it, so it can be mailed and read offline."""
    plan = ledger.plan
    parts = [
        f"<h1>Study {escape(plan.name)}</h1>",
        f"<p>{escape(plan.method)} at {plan.resolution}, protocol holdout, {escape(plan.source)}, "
        f"{precision}; {len(ledger.told)} configurations, {len(ledger.stopped)} of them stopped. "
        "Stopped ones stand in the charts with the objectives that they were expected to "
        "reach.</p>",
        f"<h2>Best configuration: number {number}</h2>",
        to_html(scenes),
        f"<details><summary>best.yaml</summary><pre>{escape(best_yaml)}</pre></details>",
    ]
    for index, (title, about, figure) in enumerate(_figures(ledger)):
        figure.update_layout(title=None, margin={"t": 30})
        chart = chart_to_html(
            figure, full_html=False, include_plotlyjs=index == 0, div_id=f"chart-{index}"
        )
        parts.append(f"<h2>{escape(title)}</h2><p>{escape(about)}</p>{chart}")
    parts.append(f"<h2>Configurations</h2><div class=wide>{to_html(configurations)}</div>")
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(plan.name)}</title>'
        f"<style>{_STYLE}{STYLE}</style><body>{body}</body></html>\n"
    )


def _figures(ledger: Ledger) -> Iterator[tuple[str, str, go.Figure]]:
    """Title, a sentence and the chart."""
    study, objectives = ledger.study, ledger.plan.spec.objectives
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    for index, name in enumerate(objectives):
        # Without a target, Optuna draws the best so far; it knows that of a single objective.
        target = None if len(objectives) == 1 else lambda trial, i=index: trial.values[i]
        figure = charts.plot_optimization_history(study, target=target, target_name=name)
        yield f"History of {name}", "Each configuration in the order of its number.", figure
    if len(objectives) in (2, 3):
        figure = charts.plot_pareto_front(study, target_names=list(objectives))
        yield "Pareto front", "No configuration is better in all objectives.", figure
    if len(complete) >= _ENOUGH and len(ledger.plan.spec.space) > 1:
        first = objectives[0]
        # Given a target, Optuna takes low for good; it knows the direction of a single objective.
        target = None if len(objectives) == 1 else lambda trial: -trial.values[0]
        figure = charts.plot_parallel_coordinate(study, target=target, target_name=first)
        about = f"One line per configuration, the darker the better in {first}."
        yield "Parallel coordinates", about, figure
        about = "Share of each knob in what separates good configurations (PED-ANOVA)."
        yield "Importances", about, importances(ledger)
    yield "Race", "Units of each configuration, and what became of it.", _race(ledger)
    if ledger.field_seconds:
        about = "Training seconds: measured, and what the same configurations would have taken."
        yield "Cost", about, _cost(ledger)


def importances(ledger: Ledger) -> go.Figure:
    """PED-ANOVA's share of each knob in what makes a configuration good, overall and, where
    scenes are trained apart, by scene."""
    figure = go.Figure()
    evaluator, first = PedAnovaImportanceEvaluator(), ledger.plan.spec.objectives[0]
    # PED-ANOVA asks what makes a target low.
    targets = {"overall": lambda trial: -trial.values[0]}
    trainings = ledger.plan.trainings
    for scene in trainings if len(trainings) > 1 else ():
        targets[scene] = lambda trial, s=scene: -_value_on(ledger, trial, s, first)
    for name, target in targets.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # That it does.
            shares = get_param_importances(ledger.study, evaluator=evaluator, target=target)
        visible = True if name == "overall" else "legendonly"
        bar = go.Bar(x=list(shares), y=list(shares.values()), name=name, visible=visible)
        figure.add_trace(bar)
    return figure


def _value_on(ledger: Ledger, trial: FrozenTrial, scene: str, quality: str) -> float:
    """The objective on one scene at the highest rung reached; the mean where it never ran."""
    reached = [(rung, m) for (s, rung), m in ledger.results(trial.number).items() if s == scene]
    metrics = max(reached, key=lambda pair: pair[0], default=(0, None))[1]
    return metrics[quality] if metrics else trial.values[0]


def _race(ledger: Ledger) -> go.Figure:
    figure = go.Figure()
    trials = ledger.study.get_trials(deepcopy=False)
    for rung in range(ledger.plan.rungs):
        counts = {
            number: sum(r == rung for _, r in ledger.results(number)) for number in ledger.told
        }
        ends = [ledger.how_it_ended(trials[number]) for number in counts]
        bar = go.Bar(x=list(counts), y=list(counts.values()), name=f"rung {rung}", hovertext=ends)
        figure.add_trace(bar)
    figure.update_layout(barmode="stack", xaxis_title="configuration", yaxis_title="units")
    return figure


def _cost(ledger: Ledger) -> go.Figure:
    fields = sum(ledger.field_seconds.values())
    whole, spent = [], 0.0
    for number in ledger.told:
        last: dict[str, float] = {}
        for (scene, _), metrics in sorted(ledger.results(number).items(), key=lambda e: e[0][1]):
            if metrics:
                last[scene] = metrics.get("seconds", 0.0)  # of all rungs so far
        spent += sum(last.values())
        if number not in ledger.stopped:
            whole.append(sum(last.values()))
    each, count = sum(whole) / max(len(whole), 1), len(ledger.told)
    bars = {
        "both stages, every scene": count * (fields + each),
        "stage 1 once": fields + count * each,
        "stage 1 once, race (measured)": fields + spent,
    }
    figure = go.Figure(go.Bar(x=list(bars.values()), y=list(bars), orientation="h"))
    figure.update_layout(xaxis_title="training seconds")
    return figure

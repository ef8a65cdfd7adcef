"""The tables of a report: scores, published scores, costs and scores by view."""

from collections.abc import Sequence

from cbnerf.compare.history import RELEASED_PSNR
from cbnerf.compare.protocols import PUBLISHED
from cbnerf.compare.rows import NO_SYSTEMS
from cbnerf.compare.run import Comparison, Results, Scored
from cbnerf.report.tables import Cell, Table, mark_best

_DIGITS = {"psnr": 2, RELEASED_PSNR: 2}
_LABELS = {"psnr": "PSNR (dB)", RELEASED_PSNR: "PSNR as released (dB)"}
_LOWER_IS_BETTER = ("lpips", "flip")


def score_tables(comparison: Comparison, results: Results) -> list[Table]:
    """A table for each metric: systems in rows, scenes and their mean in columns."""
    tables = []
    for metric in list_metrics(results):
        values = [
            [results.scores[row.name][scene].summary[metric] for scene in comparison.scenes]
            + [scene_means(results.scores[row.name])[metric]]
            for row in comparison.rows
        ]
        best = mark_best(
            values,
            [row.part not in NO_SYSTEMS for row in comparison.rows],
            higher=metric not in _LOWER_IS_BETTER,
        )
        rows = [
            [Cell(row.name)]
            + [Cell(_show(v, metric), mark) for v, mark in zip(numbers, marks, strict=True)]
            for row, numbers, marks in zip(comparison.rows, values, best, strict=True)
        ]
        published = [
            _published_row(system, numbers, comparison.scenes)
            for system, numbers in published_numbers(comparison).items()
        ]
        title = f"{_label(metric)}, {comparison.protocol}, {comparison.resolution}"
        header = ["system", *comparison.scenes, "mean"]
        tables.append(Table(title, header, rows + published, len(published)))
    return tables


def _published_row(system: str, numbers: dict[str, float], scenes: Sequence[str]) -> list[Cell]:
    shown = [f"{numbers[scene]:.2f}" if scene in numbers else "-" for scene in scenes]
    mean = f"{sum(numbers.values()) / len(numbers):.2f}" if len(numbers) == len(scenes) else "-"
    return [Cell(f"{system}, the paper's Table 1"), *map(Cell, [*shown, mean])]


def row_table(comparison: Comparison) -> Table:
    """The images of each row, in words."""
    rows = [[Cell(row.name), Cell(row.about)] for row in comparison.rows]
    return Table("What is scored in each row", ["system", "images"], rows)


def cost_table(comparison: Comparison, results: Results) -> Table:
    """Parameters and training time of both stages of each row."""
    rows = []
    for row in comparison.rows:
        cells = [Cell(row.name)]
        for costs in zip(*(e.costs for e in results.scores[row.name].values()), strict=True):
            seconds = sum(cost.seconds for cost in costs) / len(costs)
            cells += [Cell(f"{costs[0].parameters:,}"), Cell(f"{seconds:.0f}")]
        rows.append((cells + [Cell("-")] * 4)[:5])
    header = ["system", "stage 1 parameters", "seconds", "stage 2 parameters", "seconds"]
    title = "Parameters (of the first scene) and seconds of training (mean over scenes)"
    return Table(title, header, rows)


def view_tables(comparison: Comparison, results: Results) -> list[Table]:
    """The first metric of each view, a table for each scene; `report.json` has all metrics."""
    metric = list_metrics(results)[0]
    tables = []
    for scene in comparison.scenes:
        views = list(results.scores[comparison.rows[0].name][scene].views)
        rows = [
            [Cell(row.name), *(Cell(_show(values[metric], metric))
             for values in results.scores[row.name][scene].views.values())]
            for row in comparison.rows
        ]  # fmt: skip
        header = ["system", *(f"view {view}" for view in views)]
        tables.append(Table(f"{scene}, {_label(metric)} of each view", header, rows))
    return tables


def _show(value: float, metric: str) -> str:
    return f"{value:.{_DIGITS.get(metric, 4)}f}"


def _label(metric: str) -> str:
    return _LABELS.get(metric, metric.upper())


def list_metrics(results: Results) -> list[str]:
    """Names of the metrics, the main one first."""
    return list(next(iter(next(iter(results.scores.values())).values())).summary)


def scene_means(scenes: dict[str, Scored]) -> dict[str, float]:
    """Mean of each metric over scenes."""
    entries = [scored.summary for scored in scenes.values()]
    return {name: sum(e[name] for e in entries) / len(entries) for name in entries[0]}


def published_numbers(comparison: Comparison) -> dict[str, dict[str, float]]:
    """Table 1 of the paper for these scenes, in dB by system; empty where it is not comparable."""
    if comparison.protocol != "table1" or comparison.data is None:
        return {}
    return {
        system: {scene: numbers[scene] for scene in comparison.scenes if scene in numbers}
        for system, numbers in PUBLISHED.items()
    }

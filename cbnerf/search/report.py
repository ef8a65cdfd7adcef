"""The report of a study: the best configuration as YAML, and a page of tables and charts."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from cbnerf.config import Config
from cbnerf.files import atomic_write_text
from cbnerf.overrides import save_config
from cbnerf.report.page import Code, Page, Section, write_page
from cbnerf.report.tables import Cell, Table
from cbnerf.search.charts import charts
from cbnerf.search.effects import Effect, study_effects
from cbnerf.search.plan import Plan
from cbnerf.search.spec import QUALITIES, UNITS, shown_knob, with_unit
from cbnerf.search.standing import find_standing
from cbnerf.search.state import StudyState
from cbnerf.search.study_gallery import study_gallery
from cbnerf.search.tasks import for_each_scene
from cbnerf.search.tracking import NOT_COMPARABLE
from cbnerf.search.worker import score_best

SceneScores = dict[str, dict[str, dict[str, float]]]
"""scene -> `stage 1` or `refined` -> metric -> value"""


def score_once(plan: Plan, config: Config, number: int) -> SceneScores:
    """Scores of the best configuration; its test views are scored only once."""
    file = _scores_file(plan, number)
    if not file.exists():
        scores = dict(for_each_scene(plan, score_best, config, number, trains=False))
        scores = {scene: scores[scene] for scene in plan.scenes}
        atomic_write_text(file, json.dumps(scores, indent=1))
    return json.loads(file.read_text(encoding="utf-8"))


def known_scores(state: StudyState, number: int) -> SceneScores:
    """Scores of a configuration; before its study has ended, of the validation views only."""
    file = _scores_file(state.plan, number)
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    scores: SceneScores = {}
    for scene, metrics in state.full_results(number).items():
        metrics = metrics or {}
        values = {name: metrics[name] for name in QUALITIES}
        if "val/gain" in metrics:
            before = {"val/psnr": metrics["val/psnr"] - metrics["val/gain"]}
            scores[scene] = {"stage 1": before, "refined": values}
        else:
            scores[scene] = {"stage 1": values}
    return scores


def _scores_file(plan: Plan, number: int) -> Path:
    return plan.folder / f"scores-{number:04d}.json"


def scene_table(scores: SceneScores) -> Table:
    """Scores of stage 1 and of the refiner and their difference, by scene and as means."""
    columns = [("val", "psnr"), ("test", "psnr"), ("test", "ssim")]
    header = ["scene"]
    for prefix, metric in columns:
        label = f"{prefix} {'PSNR' if metric == 'psnr' else 'SSIM'}"
        header += [f"{label} stage 1", "refined", "gain"]
    rows = [_row(scene, entry, columns) for scene, entry in scores.items()]
    mean = {
        stage: {
            name: sum(entry[stage][name] for entry in scores.values()) / len(scores)
            for name in values
        }
        for stage, values in next(iter(scores.values())).items()
    }
    rows.append(_row("mean", mean, columns))
    return Table("", header, rows)


def write_report(
    state: StudyState,
    best: Config,
    number: int,
    scores: SceneScores,
    *,
    reload_every: int | None = None,
) -> list[Path]:
    """Write `best.yaml`, `report.md` and `report.html` into the study's folder; returns their
    paths. A browser loads the page again every `reload_every` seconds."""
    best_file = state.plan.folder / "best.yaml"
    save_config(best, best_file)
    page = study_page(state, best, number, scores, best_file.read_text(encoding="utf-8"))
    page = page._replace(reload_every=reload_every)
    return [best_file, *write_page(page, best_file.parent)]


def study_page(
    state: StudyState, best: Config, number: int, scores: SceneScores, best_yaml: str
) -> Page:
    """The report: best configuration, scores of each scene, charts, all configurations."""
    plan, effects, standing = state.plan, study_effects(state), find_standing(state)
    notes = [f"best: configuration {standing.best}, {standing.describe()}"] if standing else []
    notes += describe_effects(effects)
    notes += [
        f"{plan.method} at {plan.resolution}, protocol holdout, {plan.source}",
        f"precision of stage 1: {best.field.precision}",
        f"{len(state.ended)} configurations, {len(state.pruned)} of them pruned; charts show the "
        "expected objectives of pruned configurations",
        "val selects, test is scored once; PSNR in dB, gain = refined - stage 1",
    ]
    if state.too_large:
        others = ", ".join(f"#{number}" for number in sorted(set(state.too_large.values())))
        notes.append(
            f"{len(state.too_large)} configurations were not trained: at least as large as "
            f"{others}, which ran out of memory"
        )
    notes += [] if plan.data else [NOT_COMPARABLE]
    configurations = f"Best configuration: number {number}"
    return Page(
        f"Study {plan.name}",
        notes,
        [
            Section(configurations, [scene_table(scores), Code("best.yaml", best_yaml)]),
            *confirmation_section(state),
            *effects_section(effects, plan.spec.objectives[0], plan.trainings),
            Section("", [*study_gallery(state), *charts(state, effects)]),
            Section("Configurations", [configuration_table(state)]),
        ],
    )


def describe_effects(effects: Sequence[Effect]) -> list[str]:
    """Sentences that name the knobs with, without and with an unknown effect; none if empty."""
    acting = [effect.knob for effect in effects if effect.is_seen]
    idle = [effect.knob for effect in effects if not effect.is_seen and effect.is_bounded]
    unknown = [effect.knob for effect in effects if not effect.is_seen and not effect.is_bounded]
    sentences = {
        "knobs with an effect, the largest first": acting,
        "knobs without an effect that is seen": idle,
        "too few configurations to tell": unknown,
    }
    return [f"{about}: {', '.join(knobs)}" for about, knobs in sentences.items() if knobs]


def effects_section(
    effects: Sequence[Effect], quality: str, scenes: Sequence[str]
) -> list[Section]:
    """The table of effects, the largest first, and that of each scene for those that are seen; none
    if nothing could be estimated."""
    header = ["knob", "effect", "95 % interval", "conclusion"]
    rows = []
    for effect in effects:
        low, high = with_unit(effect.low, quality), with_unit(effect.high, quality)
        size = with_unit(effect.size, quality)
        cells = [effect.knob, size, f"{low} to {high}", effect.describe(quality)]
        rows.append([Cell(text, effect.is_seen) for text in cells])
    title = f"Effect of each knob ({UNITS[quality]}, 95 % interval)"
    tables = [Table("", header, rows)]
    by_scene = [
        [Cell(effect.knob), *(Cell(bounds.describe(quality)) for bounds in effect.by_scene)]
        for effect in effects
        if effect.is_seen
    ]
    if by_scene and len(scenes) > 1:
        tables.append(Table("By scene", ["knob", *scenes], by_scene))
    return [Section(title, tables)] if rows else []


def confirmation_section(state: StudyState) -> list[Section]:
    """The leaders after training with other seeds; nothing if none was confirmed."""
    confirmed, seeds = state.confirmed(), state.confirmation.seeds(state.leaders())
    if not confirmed:
        return []
    before, first = state.results_of_search(), state.plan.spec.objectives[0]
    rows = []
    for number in state.ranking()[: len(confirmed)]:
        means = list(confirmed[number].values())
        cells = [str(number), f"{sum(means) / len(means):.5g}", f"{before[number]:.5g}"]
        rows.append([Cell(text) for text in cells])
    header = ["#", f"mean {first} over other seeds ({len(seeds)})", "in the search"]
    return [Section("Leaders trained again", [Table("", header, rows)])]


def configuration_table(state: StudyState) -> Table:
    """All configurations with their objectives, best first."""
    names, objectives = list(state.plan.spec.space), state.plan.spec.objectives
    trials = state.study.get_trials(deepcopy=False)
    trials.sort(key=lambda trial: trial.values[0] if trial.values else -math.inf, reverse=True)
    rows = []
    for trial in trials:
        if trial.params:
            values = [f"{value:.5g}" for value in trial.values or []] or ["-"] * len(objectives)
            knobs = [shown_knob(trial.params.get(name, "")) for name in names]
            cells = [str(trial.number), *values, state.describe_end(trial), *knobs]
            rows.append([Cell(text) for text in cells])
    return Table("", ["#", *objectives, "end", *names], rows)


def _row(
    name: str, entry: dict[str, dict[str, float]], columns: list[tuple[str, str]]
) -> list[Cell]:
    cells = [name]
    for prefix, metric in columns:
        before = entry["stage 1"].get(f"{prefix}/{metric}")
        after = entry.get("refined", {}).get(f"{prefix}/{metric}")
        digits = 2 if metric == "psnr" else 4
        cells.append("-" if before is None else f"{before:.{digits}f}")
        if before is None or after is None:
            cells += ["-", "-"]
        else:
            cells += [f"{after:.{digits}f}", f"{after - before:+.{digits}f}"]
    return [Cell(text) for text in cells]

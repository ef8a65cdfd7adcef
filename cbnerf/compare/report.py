"""The report of a comparison: a page with figures, `report.json`, and tables in LaTeX."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import cbnerf
from cbnerf.compare.protocols import DESCRIPTIONS, WITHOUT_PHOTOGRAPH
from cbnerf.compare.run import Comparison, Results
from cbnerf.compare.score_tables import (
    cost_table,
    list_metrics,
    published_numbers,
    row_table,
    scene_means,
    score_tables,
    view_tables,
)
from cbnerf.config import flatten
from cbnerf.files import atomic_write_text
from cbnerf.report import figures
from cbnerf.report.figures import Panel
from cbnerf.report.gallery import PHOTOGRAPH, Shot, View, gallery
from cbnerf.report.page import HTML_FILE, MARKDOWN_FILE, Chart, Page, Picture, Section, write_page
from cbnerf.report.tables import to_latex, to_markdown

REPORT_FILES = (
    MARKDOWN_FILE, HTML_FILE, "report.json", "tables.tex", "crops.png", "errors.png"
)  # fmt: skip
_IN_FIGURES = ("stage 1", "refined")
_BUDGET = 8_000_000
"""Maximum bytes of the gallery's images."""


def write_report(
    comparison: Comparison, results: Results, folder: Path, device: torch.device
) -> str:
    """Write `REPORT_FILES` into a folder; returns the main tables as Markdown."""
    main = score_tables(comparison, results)
    details = [
        row_table(comparison), cost_table(comparison, results), *view_tables(comparison, results)
    ]  # fmt: skip
    crops, errors = draw_figures(comparison, results)
    pictures = [
        Picture("crops", f"The same crop of every system. {figures.RULE}", crops),
        Picture(
            "errors",
            f"Absolute errors of the same views; white is {figures.LARGEST_ERROR} and more.",
            errors,
        ),
    ]
    notes = _notes(comparison, results, device)
    blocks = [*main, *pictures, *details, _make_gallery(comparison, results)]
    write_page(Page(_title(comparison), notes, [Section("", blocks)]), folder)
    atomic_write_text(folder / "tables.tex", "\n\n".join(map(to_latex, main)) + "\n")
    content = to_plain(comparison, results, device)
    atomic_write_text(folder / "report.json", json.dumps(content, indent=1) + "\n")
    return "\n\n".join(map(to_markdown, main))


def to_plain(comparison: Comparison, results: Results, device: torch.device) -> dict[str, Any]:
    """The whole comparison as plain values: the content of `report.json`."""
    return {
        "protocol": comparison.protocol,
        "protocol_description": DESCRIPTIONS[comparison.protocol],
        "resolution": comparison.resolution,
        "data": str(comparison.data or comparison.source),
        "scenes": list(comparison.scenes),
        "methods": {name: flatten(config) for name, config in comparison.methods.items()},
        "rows": {
            row.name: {
                "method": row.method,
                "about": row.about,
                "mean": scene_means(results.scores[row.name]),
                "scenes": {
                    scene: scored._asdict() | {"costs": [cost._asdict() for cost in scored.costs]}
                    for scene, scored in results.scores[row.name].items()
                },
            }
            for row in comparison.rows
        },
        "published": published_numbers(comparison),
        "precision": _precision(comparison),
        "lpips": results.about_lpips,
        "versions": {"cbnerf": cbnerf.__version__, "torch": torch.__version__},
        "device": _device_name(device),
    }


def draw_figures(comparison: Comparison, results: Results) -> tuple[Image.Image, Image.Image]:
    """Crops and error maps; a row for each scene and a column for each system."""
    crops: list[tuple[str, list[Panel]]] = []
    errors: list[tuple[str, list[Panel]]] = []
    for scene, (view, photograph, images) in results.shown.items():
        side = figures.crop_side(photograph.shape[1])
        place = figures.choose_crop(photograph, comparison.split.scale, side)
        qualities = _shown_qualities(comparison, results, scene).items()
        label = f"{scene} {view}"
        crops.append((label, [
            Panel(figures.mark_crop(photograph, place, side)),
            Panel(figures.cut_crop(photograph, place, side)),
            *(Panel(figures.cut_crop(images[name], place, side), (psnr,))
              for name, psnr in qualities),
        ]))  # fmt: skip
        errors.append((label, [
            Panel(figures.error_map(images[name], photograph), (psnr,))
            for name, psnr in qualities
        ]))  # fmt: skip
    systems = _systems(comparison)
    scale = Panel(figures.error_scale(), (f"0 to {figures.LARGEST_ERROR} of the range",))
    return (
        figures.draw_grid(["photograph", "crop of it", *systems], crops),
        figures.draw_grid(systems, errors, scale),
    )


def _systems(comparison: Comparison) -> list[str]:
    """Names of the rows that the figures and the gallery show."""
    return [row.name for row in comparison.rows if row.part in _IN_FIGURES]


def _shown_qualities(comparison: Comparison, results: Results, scene: str) -> dict[str, str]:
    """The first metric of the shown view of a scene, in words, by system."""
    view, metric = results.shown[scene].view, list_metrics(results)[0]
    scores = {name: results.scores[name][scene] for name in _systems(comparison)}
    return {name: f"{scored.views[view][metric]:.2f} dB" for name, scored in scores.items()}


def _make_gallery(comparison: Comparison, results: Results) -> Chart:
    """The whole views that the figures show crops of."""
    views = [
        View(f"{scene}, view {view}", [
            *(Shot(name, psnr, images[name])
              for name, psnr in _shown_qualities(comparison, results, scene).items()),
            Shot(PHOTOGRAPH, "", photograph),
        ])
        for scene, (view, photograph, images) in results.shown.items()
    ]  # fmt: skip
    caption = "The first view of each scene that is scored and not nerf-sr's reference."
    return gallery(caption, views, _BUDGET)


def _title(comparison: Comparison) -> str:
    data = comparison.split
    return (
        f"Comparison, protocol {comparison.protocol}, {comparison.resolution}: images "
        f"{data.width} wide from {data.width // data.scale}"
    )


def _notes(comparison: Comparison, results: Results, device: torch.device) -> list[str]:
    source = comparison.source + ("" if comparison.data else ", not comparable with the paper")
    notes = [
        f"Protocol {comparison.protocol}: {DESCRIPTIONS[comparison.protocol]}",
        f"Data: {source}. Computed by cbnerf {cbnerf.__version__} on {_device_name(device)}. "
        f"Precision of stage 1: {_precision(comparison)}.",
    ]
    if comparison.protocol == "table1":
        return notes
    notes.append(
        f"{results.about_lpips}. Bold: the best system. Rows `photograph` and `vq-vae` are no "
        "systems: they are made of the photographs that they are scored on."
    )
    if comparison.protocol in WITHOUT_PHOTOGRAPH:
        without = [m for m, c in comparison.methods.items() if c.refiner.kind == "reference"]
        notes += [
            f"{method} has no row of its own: its refiner needs a high-res photograph of the scene."
            for method in without
        ]
    return notes


def _precision(comparison: Comparison) -> str:
    """The precision of stage 1, with the names of methods if they differ."""
    found = {name: config.field.precision for name, config in comparison.methods.items()}
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    return ", ".join(f"{precision} ({name})" for name, precision in found.items())


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"

"""The report of a comparison: Markdown, HTML, JSON, LaTeX and figures, all of the same numbers."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import cbnerf
from cbnerf.compare import figure
from cbnerf.compare.figure import Panel
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
from cbnerf.files import write_whole
from cbnerf.tables import STYLE, Table, to_html, to_latex, to_markdown

REPORT_FILES = (
    "report.md", "report.html", "report.json", "tables.tex", "crops.png", "errors.png"
)  # fmt: skip
_IN_FIGURES = ("stage 1", "refined")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; }
img { max-width: 100%; }
"""


def write_report(
    comparison: Comparison, results: Results, folder: Path, device: torch.device
) -> str:
    """Write `REPORT_FILES` into a folder; returns the main tables as Markdown."""
    main = score_tables(comparison, results)
    details = [
        row_table(comparison), cost_table(comparison, results), *view_tables(comparison, results)
    ]  # fmt: skip
    crops, errors = draw_figures(comparison, results)
    title, notes = _title(comparison), _notes(comparison, results, device)
    heading = "\n".join([f"# {title}", "", *(f"- {note}" for note in notes)])
    pictures = [
        ("crops", f"The same crop of every system. {figure.RULE}", crops),
        (
            "errors",
            f"Absolute errors of the same views; white is {figure.LARGEST_ERROR} and more.",
            errors,
        ),
    ]
    figures = [f"![{about}]({name}.png)\n\n*{about}*" for name, about, _ in pictures]
    tables = list(map(to_markdown, main))

    folder.mkdir(parents=True, exist_ok=True)
    for name, _, picture in pictures:
        picture.save(folder / f"{name}.png")
    write_whole(folder / "tables.tex", "\n\n".join(map(to_latex, main)) + "\n")
    write_whole(folder / "report.html", _to_page(title, notes, main, pictures, details))
    content = to_plain(comparison, results, device)
    write_whole(folder / "report.json", json.dumps(content, indent=1) + "\n")
    sections = [heading, *tables, *figures, *map(to_markdown, details)]
    write_whole(folder / "report.md", "\n\n".join(sections) + "\n")
    return "\n\n".join(tables)


def to_plain(comparison: Comparison, results: Results, device: torch.device) -> dict[str, Any]:
    """Everything as plain values, for programs."""
    return {
        "protocol": comparison.protocol,
        "protocol_description": DESCRIPTIONS[comparison.protocol],
        "resolution": comparison.resolution,
        "data": str(comparison.data) if comparison.data else "built-in scenes",
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
        "lpips": results.about_lpips,
        "versions": {"cbnerf": cbnerf.__version__, "torch": torch.__version__},
        "device": _device_name(device),
    }


def draw_figures(comparison: Comparison, results: Results) -> tuple[Image.Image, Image.Image]:
    """Crops and error maps, a row for each scene, a column for each system."""
    systems = [row.name for row in comparison.rows if row.part in _IN_FIGURES]
    metric = list_metrics(results)[0]
    crops: list[tuple[str, list[Panel]]] = []
    errors: list[tuple[str, list[Panel]]] = []
    for scene, (view, photograph, images) in results.shown.items():
        side = figure.crop_side(photograph.shape[1])
        place = figure.choose_crop(photograph, comparison.scene(scene).scale, side)
        values = {name: results.scores[name][scene].views[view][metric] for name in systems}
        label = f"{scene} {view}"
        crops.append((label, [
            Panel(figure.mark_crop(photograph, place, side)),
            Panel(figure.cut_crop(photograph, place, side)),
            *(Panel(figure.cut_crop(images[name], place, side), (f"{values[name]:.2f} dB",))
              for name in systems),
        ]))  # fmt: skip
        errors.append((label, [
            Panel(figure.error_map(images[name], photograph), (f"{values[name]:.2f} dB",))
            for name in systems
        ]))  # fmt: skip
    scale = Panel(figure.error_scale(), (f"0 to {figure.LARGEST_ERROR} of the range",))
    return (
        figure.draw_grid(["photograph", "crop of it", *systems], crops),
        figure.draw_grid(systems, errors, scale),
    )


def _title(comparison: Comparison) -> str:
    data = comparison.split
    return (
        f"Comparison, protocol {comparison.protocol}, {comparison.resolution}: images "
        f"{data.width} wide from {data.width // data.scale}"
    )


def _notes(comparison: Comparison, results: Results, device: torch.device) -> list[str]:
    source = f"photographs in {comparison.data}" if comparison.data else (
        "built-in scenes, not comparable with the paper"
    )  # fmt: skip
    notes = [
        f"Protocol {comparison.protocol}: {DESCRIPTIONS[comparison.protocol]}",
        f"Data: {source}. Computed by cbnerf {cbnerf.__version__} on {_device_name(device)}.",
    ]
    if comparison.protocol == "table1":
        return notes
    notes.append(
        f"{results.about_lpips}. Bold: the best system; a vq-vae row is no system, for it sees the "
        "photograph that it is scored on."
    )
    if comparison.protocol in WITHOUT_PHOTOGRAPH:
        without = [m for m, c in comparison.methods.items() if c.refiner.kind == "reference"]
        notes += [
            f"{method} has no row of its own: its refiner needs a high-res photograph of the scene."
            for method in without
        ]
    return notes


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"


def _to_page(
    title: str,
    notes: list[str],
    main: list[Table],
    pictures: list[tuple[str, str, Image.Image]],
    details: list[Table],
) -> str:
    """One page that needs no other file."""
    parts = [f"<h1>{html.escape(title)}</h1>", "<ul>"]
    parts += [f"<li>{html.escape(note)}</li>" for note in notes]
    parts += ["</ul>", *map(to_html, main)]
    for _, about, picture in pictures:
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        source = base64.b64encode(stream.getvalue()).decode()
        parts.append(f'<img alt="" src="data:image/png;base64,{source}">')
        parts.append(f"<p><i>{html.escape(about)}</i></p>")
    parts += map(to_html, details)
    head = (
        f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}{STYLE}</style>'
    )
    body = "\n".join(parts)
    return f"<!doctype html>\n<html><head>{head}</head><body>\n{body}\n</body></html>\n"

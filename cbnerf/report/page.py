"""The writer of all reports: a page as Markdown, as one HTML file, and its pictures as PNG.

The HTML file embeds its pictures and charts, so it can be mailed and read offline. The Markdown
file links the pictures and has no interactive charts.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from cbnerf.files import atomic_write, atomic_write_text
from cbnerf.report.tables import STYLE, Table, to_html, to_markdown

MARKDOWN_FILE, HTML_FILE = "report.md", "report.html"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; }
img { max-width: 100%; }
pre { background: #f4f4f4; padding: 1em; overflow-x: auto; }
.caption { color: #444; }
.wide { overflow-x: auto; }
.wide td { white-space: nowrap; }
"""


class Picture(NamedTuple):
    name: str
    """Of its PNG file, without the suffix."""
    caption: str
    image: Image.Image


class Chart(NamedTuple):
    """Something interactive, in HTML only."""

    title: str
    caption: str
    html: str


class Code(NamedTuple):
    """A text file, folded in HTML."""

    name: str
    text: str


Block = Table | Picture | Chart | Code


class Section(NamedTuple):
    title: str
    """Its heading; an empty one has none."""
    blocks: Sequence[Block]


class Page(NamedTuple):
    title: str
    notes: Sequence[str]
    """Sentences below the title."""
    sections: Sequence[Section]
    reload_every: int | None = None
    """Seconds after which a browser loads the page again; None: it does not."""


def write_page(page: Page, folder: Path) -> list[Path]:
    """Write a page into a folder by atomic writes; returns its files."""
    pictures = [b for s in page.sections for b in s.blocks if isinstance(b, Picture)]
    files = [folder / f"{picture.name}.png" for picture in pictures]
    for file, picture in zip(files, pictures, strict=True):
        with atomic_write(file) as unfinished:
            picture.image.save(unfinished, "PNG")
    atomic_write_text(folder / MARKDOWN_FILE, page_to_markdown(page))
    atomic_write_text(folder / HTML_FILE, page_to_html(page))
    return [folder / MARKDOWN_FILE, folder / HTML_FILE, *files]


def page_to_markdown(page: Page) -> str:
    parts = [f"# {page.title}", "\n".join(f"- {note}" for note in page.notes)]
    for title, blocks in page.sections:
        parts += [f"## {title}"] if title else []
        parts += [_block_to_markdown(block) for block in blocks if not isinstance(block, Chart)]
    return "\n\n".join(parts) + "\n"


def _block_to_markdown(block: Table | Picture | Code) -> str:
    match block:
        case Table():
            return to_markdown(block)
        case Picture(name, caption):
            return f"![{caption}]({name}.png)\n\n*{caption}*"
        case Code(name, text):
            return f"{name}:\n\n```\n{text}```"


def page_to_html(page: Page) -> str:
    title = escape(page.title)
    notes = "\n".join(f"<li>{escape(note)}</li>" for note in page.notes)
    body = "\n".join([f"<h1>{title}</h1>", f"<ul>\n{notes}\n</ul>", *_sections_to_html(page)])
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}{STYLE}</style>'
    if page.reload_every:
        head += f'<meta http-equiv="refresh" content="{page.reload_every}">'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _sections_to_html(page: Page) -> Iterator[str]:
    for title, blocks in page.sections:
        if title:
            yield f"<h2>{escape(title)}</h2>"
        yield from map(_block_to_html, blocks)


def _block_to_html(block: Block) -> str:
    match block:
        case Table():
            return f"<div class=wide>{to_html(block)}</div>"
        case Picture(_, caption, image):
            return f'<img alt="" src="{data_uri(image, "PNG")}">\n{_caption(caption)}'
        case Chart(title, caption, html):
            return f"<h2>{escape(title)}</h2>{_caption(caption)}{html}"
        case Code(name, text):
            return f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>"


def _caption(text: str) -> str:
    return f"<p class=caption>{escape(text)}</p>"


def data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    """An image as part of a page, in a format of Pillow and with its options."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    content = base64.b64encode(stream.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{content}"

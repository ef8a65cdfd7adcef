"""Tables that can be written as Markdown, HTML and LaTeX."""

import html
from collections.abc import Callable, Sequence
from typing import NamedTuple

STYLE = """
table { border-collapse: collapse; margin-bottom: 1em; }
th, td { padding: 2px 10px; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
td.best { font-weight: bold; }
tr.apart td { border-top: 2px solid #888; }
"""
"""CSS for the tables of `to_html`."""

_LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$"}


class Cell(NamedTuple):
    text: str
    bold: bool = False


class Table(NamedTuple):
    title: str
    """Its heading; none if empty."""
    header: list[str]
    rows: list[list[Cell]]
    """The first cell of a row is its name."""
    apart: int = 0
    """How many rows at the end are below a line: results of others."""


def mark_best(
    values: Sequence[Sequence[float | None]], eligible: Sequence[bool], *, higher: bool
) -> list[list[bool]]:
    """Which values are the best of their column among eligible rows, if there are two or more."""
    choose: Callable = max if higher else min
    marks = [[False] * len(row) for row in values]
    for column in range(len(values[0])):
        found = [row[column] for row, may in zip(values, eligible, strict=True) if may]
        present = [value for value in found if value is not None]
        if len(present) > 1:
            best = choose(present)
            for number, row in enumerate(values):
                marks[number][column] = eligible[number] and row[column] == best
    return marks


def to_markdown(table: Table) -> str:
    """A table that is aligned as plain text."""
    rows = [[f"**{c.text}**" if c.bold else c.text for c in row] for row in table.rows]
    widths = [max(map(len, column)) for column in zip(table.header, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "-" * (widths[0] + 2) + "|" + "|".join("-" * (w + 1) + ":" for w in widths[1:])
    title = [f"### {table.title}", ""] if table.title else []
    return "\n".join([*title, line(table.header), rule + "|", *map(line, rows)])


def to_html(table: Table) -> str:
    first_apart = len(table.rows) - table.apart
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.header)
    body = []
    for number, row in enumerate(table.rows):
        cells = "".join(
            f"<td{' class=best' * cell.bold}>{html.escape(cell.text)}</td>" for cell in row
        )
        apart = ' class="apart"' if table.apart and number == first_apart else ""
        body.append(f"<tr{apart}>{cells}</tr>")
    title = f"<h3>{html.escape(table.title)}</h3>\n" if table.title else ""
    return f"{title}<table>\n<tr>{head}</tr>\n" + "\n".join(body) + "\n</table>"


def to_latex(table: Table) -> str:
    """For the package `booktabs`."""
    first_apart = len(table.rows) - table.apart
    lines = [r"\begin{tabular}{l" + "r" * (len(table.header) - 1) + "}", r"\toprule"]
    lines += [" & ".join(map(_escape, table.header)) + r" \\", r"\midrule"]
    for number, row in enumerate(table.rows):
        if table.apart and number == first_apart:
            lines.append(r"\midrule")
        cells = [rf"\textbf{{{_escape(c.text)}}}" if c.bold else _escape(c.text) for c in row]
        lines.append(" & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    title = table.title.replace("\n", " ")
    return f"% {title}\n" + "\n".join(lines)


def _escape(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)

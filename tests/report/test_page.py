import re

import pytest
from comparing import read_files
from PIL import Image

from cbnerf.report.page import (
    Chart,
    Code,
    Page,
    Picture,
    Section,
    page_to_html,
    page_to_markdown,
    write_page,
)
from cbnerf.report.tables import Cell, Table, to_html, to_markdown

TABLE = Table("", ["<b>", "dB"], [[Cell("one"), Cell("1.0")]])
PICTURE = Picture("crops", "The same crop.", Image.new("RGB", (8, 4), "red"))
PAGE = Page(
    "Study <one>",
    ["a & b", "a second note"],
    [
        Section("Best", [TABLE, Code("best.yaml", "<script>\n")]),
        Section("", [PICTURE, Chart("History", "One dot each.", "<div id=c></div>")]),
    ],
)


def test_markdown_has_titles_notes_tables_and_links_but_no_charts():
    text = page_to_markdown(PAGE)
    assert text.startswith("# Study <one>\n\n- a & b\n- a second note\n\n## Best\n\n")
    assert to_markdown(TABLE) in text and "![The same crop.](crops.png)" in text
    assert "```\n<script>\n```" in text and "History" not in text


def test_html_escapes_text_and_embeds_pictures_and_charts():
    page = page_to_html(PAGE)
    assert to_html(TABLE) in page and "<h1>Study &lt;one&gt;</h1>" in page
    assert "<pre>&lt;script&gt;\n</pre>" in page and "<script>" not in page
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Best", "History"]
    assert "<div id=c></div>" in page and page.count("data:image/png;base64,") == 1
    assert not re.search(r"(?:src|href)=.(?!data:)", page)


def test_a_page_is_written_with_its_pictures(tmp_path):
    files = write_page(PAGE, tmp_path / "new")
    assert [file.name for file in files] == ["report.md", "report.html", "crops.png"]
    assert sorted(files) == sorted((tmp_path / "new").iterdir())
    with Image.open(tmp_path / "new" / "crops.png") as picture:
        assert picture.size == (8, 4)


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path):
    write_page(PAGE, tmp_path)
    before = read_files(tmp_path)
    broken = Picture("crops", "", None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(AttributeError):
        write_page(PAGE._replace(sections=[Section("", [broken])]), tmp_path)
    assert read_files(tmp_path) == before

import re

from cbnerf.report.tables import Cell, Table, mark_best, to_html, to_latex, to_markdown

TABLE = Table(
    "PSNR & co",
    ["system", "a_1", "mean"],
    [[Cell("one <1>"), Cell("20.00"), Cell("21.5", bold=True)],
     [Cell("theirs"), Cell("-"), Cell("9")]],
    apart=1,
)  # fmt: skip


def test_markdown_is_aligned():
    title, empty, *lines = to_markdown(TABLE).splitlines()
    assert (title, empty) == ("### PSNR & co", "")
    assert lines == [
        "| system  |   a_1 |     mean |",
        "|---------|------:|---------:|",
        "| one <1> | 20.00 | **21.5** |",
        "| theirs  |     - |        9 |",
    ]


def test_without_a_title_there_is_no_heading():
    bare = TABLE._replace(title="")
    assert to_markdown(bare) == to_markdown(TABLE).split("\n\n")[1]
    assert to_html(bare) == to_html(TABLE).split("</h3>\n")[1]


def test_html_is_escaped_and_marks_the_best():
    page = to_html(TABLE)
    assert "<h3>PSNR &amp; co</h3>" in page and "one &lt;1&gt;" in page
    assert re.findall(r"<td class=best>(.*?)</td>", page) == ["21.5"]
    assert re.search(r'<tr class="apart"><td>theirs', page)


def test_latex_is_escaped_and_has_a_rule_above_the_rows_of_others():
    lines = to_latex(TABLE).splitlines()
    assert lines[:3] == ["% PSNR & co", r"\begin{tabular}{lrr}", r"\toprule"]
    assert lines[3:] == [
        r"system & a\_1 & mean \\", r"\midrule", r"one <1> & 20.00 & \textbf{21.5} \\",
        r"\midrule", r"theirs & - & 9 \\", r"\bottomrule", r"\end{tabular}",
    ]  # fmt: skip


def test_the_best_of_each_column_is_marked_among_those_that_count():
    values = [[1.0, 5.0], [3.0, 4.0], [9.0, 9.0]]
    assert mark_best(values, [True, True, False], higher=True) == [
        [False, True], [True, False], [False, False]
    ]  # fmt: skip
    assert mark_best(values, [True, True, True], higher=False)[0] == [True, False]
    assert mark_best([[1.0]], [True], higher=True) == [[False]]  # alone, it is no winner

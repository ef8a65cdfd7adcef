import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from cbnerf import cli
from cbnerf.console import expand_homes, explain_unforeseen

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""A locale in which Python encodes files and output as ASCII."""


def failed() -> AssertionError:
    try:
        raise AssertionError("codes\nare lost")
    except AssertionError as error:
        return error


def test_a_locale_that_cannot_encode_a_name_prints_it_as_an_escape():
    code = "from cbnerf.console import prepare_output; prepare_output(); print('k\\xfcche \\u2192')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **ASCII}, capture_output=True, check=True
    )
    assert done.stdout == b"k\\xfcche \\u2192\n"


@pytest.mark.parametrize("there", [True, False])
def test_what_nobody_foresaw_is_one_line_and_a_file(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    storage, elsewhere = tmp_path / "my runs", tmp_path / "temporary"
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    elsewhere.mkdir()
    if there:
        storage.mkdir()
    say, _, where = explain_unforeseen(failed(), storage).partition("; traceback in ")
    assert say == "AssertionError: codes are lost"
    (file,) = map(Path, shlex.split(where))
    assert file.parent == (storage if there else elsewhere)
    text = file.read_text(encoding="utf-8")
    assert text.startswith("Traceback") and "in failed" in text and text.endswith("are lost\n")
    assert storage.exists() == there


def test_where_nothing_can_be_written_the_line_is_told_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    line = explain_unforeseen(failed(), tmp_path / "runs", "the field is lost")
    assert line == "the field is lost; its traceback could not be kept"


def test_the_command_line_ends_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(command: cli.Cache) -> None:
        raise failed()

    monkeypatch.setattr(cli.Cache, "run", fail)
    with pytest.raises(SystemExit) as end:
        cli.main(["cache", "list", "--storage", str(tmp_path)])
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cbnerf: AssertionError: codes are lost; traceback in ")
    assert [str(file) for file in tmp_path.iterdir()] == shlex.split(line)[-1:]


def test_a_tilde_that_the_shell_has_left_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    @dataclass
    class Paths:
        one: Path = Path("~/runs")
        several: tuple[Path, ...] = (Path("~/a"), Path("b/~"))
        none: Path | None = None
        name: str = "~"

    monkeypatch.setenv("HOME", str(tmp_path))
    paths = Paths()
    expand_homes(paths)
    assert paths == Paths(tmp_path / "runs", (tmp_path / "a", Path("b/~")), None, "~")
    with pytest.raises(ValueError, match="~nobody-of-this-name/x: there is no such home folder"):
        expand_homes(Paths(one=Path("~nobody-of-this-name/x")))

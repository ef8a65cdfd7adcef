import ast
import errno
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cbnerf
from cbnerf.files import (
    atomic_write,
    atomic_write_text,
    check_may_write,
    expand_home,
    is_about_space,
)

ROOT = Path(__file__).parents[1]


def test_a_reader_sees_the_old_text_or_the_new_one(tmp_path: Path):
    target = tmp_path / "deep" / "file.txt"
    atomic_write_text(target, "old")
    with atomic_write(target) as unfinished:
        unfinished.write_text("new, and longer", encoding="utf-8")
        assert target.read_text(encoding="utf-8") == "old"
    assert target.read_text(encoding="utf-8") == "new, and longer"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt()])
def test_what_fails_leaves_nothing_and_harms_nothing(tmp_path: Path, error: BaseException):
    target = tmp_path / "file.txt"
    atomic_write_text(target, "old")
    with pytest.raises(type(error)), atomic_write(target) as unfinished:
        unfinished.write_text("half", encoding="utf-8")
        raise error
    with pytest.raises(type(error)), atomic_write(tmp_path / "folder") as unfinished:
        (unfinished / "deeper").mkdir(parents=True)
        raise error
    assert list(tmp_path.iterdir()) == [target]
    assert target.read_text(encoding="utf-8") == "old"


def test_a_folder_comes_with_all_that_is_in_it(tmp_path: Path):
    with atomic_write(tmp_path / "folder") as unfinished:
        unfinished.mkdir()
        (unfinished / "one").write_text("1", encoding="utf-8")
        assert not (tmp_path / "folder").exists()
    assert (tmp_path / "folder" / "one").read_text(encoding="utf-8") == "1"


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_home(Path("~/runs")) == tmp_path / "runs"
    for same in ("runs", "/runs", "a/~/b"):
        assert expand_home(Path(same)) == Path(same)
    with pytest.raises(ValueError, match="~nobody-of-this-name/runs: there is no such home folder"):
        expand_home(Path("~nobody-of-this-name/runs"))


def test_text_is_utf8_in_any_locale(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from cbnerf.files import atomic_write_text; "
        "atomic_write_text(Path(sys.argv[1]), 'k\\xfcche \\u2192')"
    )
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    file = tmp_path / "report.html"
    subprocess.run([sys.executable, "-c", code, file], env={**os.environ, **locale}, check=True)
    assert file.read_bytes() == "küche →".encode()


def texts_in_the_encoding_of_the_locale(file: Path) -> Iterator[str]:
    """ruff (PLW1514) sees those only whose kind it can tell."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(k.arg == "encoding" for k in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        opened = name == "open" and any(
            isinstance(mode, ast.Constant) and mode.value in ("r", "w", "a", "x", "r+", "w+")
            for mode in [*node.args, *(k.value for k in node.keywords)]
        )
        bare = name == "open" and isinstance(node.func, ast.Attribute) and not node.args
        if name in ("read_text", "write_text") or opened or bare:
            yield f"{file}:{node.lineno}"


def test_no_text_file_depends_on_the_locale():
    folders = [Path(cbnerf.__file__).parent, ROOT / "tests", ROOT / "benchmarks"]
    files = [file for folder in folders for file in folder.rglob("*.py")]
    assert not [place for file in files for place in texts_in_the_encoding_of_the_locale(file)]


def raised(cause: Exception) -> Exception:
    try:
        try:
            raise cause
        except Exception as error:
            raise RuntimeError("the report was not written") from error
    except RuntimeError as error:
        return error


def test_a_full_disk_is_told_from_errors_that_happen_on_one():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "field.pt")
    quota = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    for error in (full, quota, sqlite3.OperationalError("database or disk is full")):
        assert is_about_space(error) and is_about_space(raised(error))
    assert is_about_space(RuntimeError("OSError: [Errno 28] No space left on device"))
    for error in (ValueError("trials must be at least 1"), PermissionError(13, "no"), KeyError(28)):
        assert not is_about_space(error) and not is_about_space(raised(error))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    check_may_write(tmp_path / "new" / "folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(ValueError, match="file: a file, and not a folder"):
            check_may_write(folder)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_folder_of_somebody_else_is_named(tmp_path: Path):
    code = "import sys; from pathlib import Path; from cbnerf.files import check_may_write; "
    code += "check_may_write(Path(sys.argv[1]) / 'runs')"
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    # Root may write everywhere, and a user without a name may not.
    done = subprocess.run(
        ["unshare", "--user", "--map-user=12345", sys.executable, "-c", code, locked],
        capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    if done.stderr.startswith("unshare:"):
        pytest.skip("needs user namespaces")
    assert done.stderr.splitlines()[-1] == (
        f"ValueError: {locked}: this user may not write there; give another folder"
    )

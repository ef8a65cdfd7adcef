from pathlib import Path

import pytest

from cbnerf.files import expand_home, whole, write_whole


def test_a_reader_sees_the_old_text_or_the_new_one(tmp_path: Path):
    target = tmp_path / "deep" / "file.txt"
    write_whole(target, "old")
    with whole(target) as unfinished:
        unfinished.write_text("new, and longer")
        assert target.read_text() == "old"
    assert target.read_text() == "new, and longer"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt()])
def test_what_fails_leaves_nothing_and_harms_nothing(tmp_path: Path, error: BaseException):
    target = tmp_path / "file.txt"
    write_whole(target, "old")
    with pytest.raises(type(error)), whole(target) as unfinished:
        unfinished.write_text("half")
        raise error
    with pytest.raises(type(error)), whole(tmp_path / "folder") as unfinished:
        (unfinished / "deeper").mkdir(parents=True)
        raise error
    assert list(tmp_path.iterdir()) == [target]
    assert target.read_text() == "old"


def test_a_folder_comes_with_all_that_is_in_it(tmp_path: Path):
    with whole(tmp_path / "folder") as unfinished:
        unfinished.mkdir()
        (unfinished / "one").write_text("1")
        assert not (tmp_path / "folder").exists()
    assert (tmp_path / "folder" / "one").read_text() == "1"


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_home(Path("~/runs")) == tmp_path / "runs"
    for same in ("runs", "/runs", "a/~/b"):
        assert expand_home(Path(same)) == Path(same)
    with pytest.raises(ValueError, match="~nobody-of-this-name/runs: there is no such home folder"):
        expand_home(Path("~nobody-of-this-name/runs"))

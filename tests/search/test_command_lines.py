"""Command lines of `tune.py` that cannot be carried out: one line, and nothing written."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from drawings import draw
from drivers import SMOKE, call_tune, content
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cbnerf.data.llff import write_capture
from cbnerf.search import command
from cbnerf.search.request import Options, read_request, settle

pytestmark = pytest.mark.search


BAD_LINES = {
    "scene": (["--scenes", "nowhere"], "no scene 'nowhere' in the built-in scenes"),
    "data": (["--data", "nowhere"], "nowhere: no scenes"),
    "no file": (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
    "broken file": (["--config", "broken.yaml"], "broken.yaml: not readable as YAML"),
    "method": (["--method", "nerf2"], "method 'nerf2' is not one of nerf, nerf-sr"),
    "resolution": (["--resolution", "x9"], "resolution 'x9' is not one of auto"),
    "trials": (["--trials", "0"], "trials must be at least 1"),
    "concurrency": (["--concurrency", "0"], "--concurrency must be at least 1"),
    "confirm": (["--confirm", "-1"], "--confirm must be at least 0"),
    "too many GPUs": (["--gpus", "1.5"], "(--gpus) = 1.5 must be 0, 1 or a part of 1"),
    "no stage 2": (["--method", "nerf"], "nerf ends with stage 1"),
    "name": (["--name", "a/b"], "'a/b' is not the name of a folder"),
    "resume": (["--resume"], "--resume: give the study's --name"),
    "resume unknown": (["--resume", "--name", "x"], "it holds none"),
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_bad_input_ends_in_one_line_and_leaves_nothing(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "broken.yaml").write_text("space: [", encoding="utf-8")
    arguments, problem = BAD_LINES[what]
    assert call_tune(monkeypatch, *arguments) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    (line,) = errors.splitlines()
    assert line.startswith("tune.py: ") and problem in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["broken.yaml"]


def test_a_broken_scene_folder_is_named_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "photos" / "fern").mkdir(parents=True)
    (tmp_path / "photos" / "fern" / "poses_bounds.npy").write_bytes(b"nonsense")
    assert call_tune(monkeypatch, "--data", "photos") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "fern/poses_bounds.npy" in line
    assert not (tmp_path / "runs").exists()


def test_too_few_photographs_are_refused_with_what_a_search_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    write_capture(tmp_path / "photos" / "mine", draw("mosaic", width=64, num_views=4))
    assert call_tune(monkeypatch, "--config", str(SMOKE), "--data", "photos") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "mine: of 4 photographs" in line
    assert "or set `data.test_every: 7` under `fixed` of --config" in line
    spec = yaml.safe_load(SMOKE.read_text(encoding="utf-8"))
    spec["fixed"] = spec.get("fixed", {}) | {"data.test_every": 7}
    (tmp_path / "mended.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    options = Options(config=tmp_path / "mended.yaml", data=tmp_path / "photos",
                              storage=tmp_path / "runs")  # fmt: skip
    settled = settle(read_request(options, SMOKE), options, has_gpu=False)
    assert settled.views == {"mine": 4}
    assert not (tmp_path / "runs").exists()


def test_what_never_fits_on_this_machine_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    big = SMOKE.read_text(encoding="utf-8") + "\nresources: {cpus_per_worker: 1000}\n"
    (tmp_path / "big.yaml").write_text(big, encoding="utf-8")
    assert call_tune(monkeypatch, "--config", "big.yaml", "--scenes", "arcade") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "needs 1000 CPUs" in line and "--address" in line
    assert not (tmp_path / "runs").exists()


def test_anything_unforeseen_is_one_line_that_names_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("cbnerf.search.request.make_plan", fail)
    (tmp_path / "my runs").mkdir()
    assert call_tune(monkeypatch, "--storage", "my runs") == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("tune.py: AssertionError; traceback in ")
    (file,) = (tmp_path / "my runs").iterdir()
    assert shlex.split(line)[-1] == str(file)
    assert "in fail" in file.read_text(encoding="utf-8")


ODD = st.text(alphabet="ab ~%?#'\"\\$&;é日\u202f\udcff\n*[]{}:!", min_size=1, max_size=8)


PATHS = st.tuples(st.sampled_from(["", "here/", "./", "a/../", "link/", "file/"]), ODD,
                  st.sampled_from(["", "/", "/deeper"])).map("".join)  # fmt: skip


FLAGS = st.fixed_dictionaries(
    {},
    optional={
        "--name": ODD,
        "--scenes": st.one_of(ODD, st.sampled_from(["all", "mosaic", "mosaic,mosaic", ",", ""])),
        "--data": PATHS,
        "--config": st.one_of(PATHS, st.just(str(SMOKE))),
        "--trials": st.sampled_from(["0", "-1", "1", "nan", "1e9", "", "3"]),
        "--resolution": st.one_of(ODD, st.sampled_from(["tiny", "auto", "x2-128"])),
        "--method": st.one_of(ODD, st.sampled_from(["cb-nerf", "nerf", "linear"])),
        "--concurrency": st.sampled_from(["0", "-3", "1", "x"]),
        "--gpus": st.sampled_from(["-1", "nan", "inf", "0", "0.25", "x"]),
    },
)


@settings(
    max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(storage=PATHS, flags=FLAGS, resume=st.booleans())
def test_an_odd_command_line_is_a_plan_or_one_line(
    storage: str, flags: dict[str, str], resume: bool,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
):  # fmt: skip
    class Planned(KeyboardInterrupt):
        """Ray would start."""

    def stop(address: str | None) -> None:
        raise Planned

    monkeypatch.setattr(command, "_ray", stop)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "file").touch()
    (tmp_path / "here").mkdir(exist_ok=True)
    (tmp_path / "link").is_symlink() or (tmp_path / "link").symlink_to("here")
    before = content(tmp_path)
    words = [f"{name}={value}" for name, value in flags.items()]
    status = call_tune(monkeypatch, f"--storage={storage}", *words, *["--resume"] * resume)
    output, errors = capfd.readouterr()
    assert "Traceback" not in output + errors and "traceback" not in output + errors
    assert content(tmp_path) == before
    if status == command._INTERRUPTED:  # It was planned, so all of this must be sound.
        assert float(flags.get("--gpus", "0")) >= 0 and not resume
        assert "\n" not in storage + flags.get("--name", "") and "\udcff" not in storage
        assert not storage.startswith("file/")
        assert flags.get("--scenes") in (None, "all", "mosaic", "mosaic,mosaic")
        assert flags.get("--trials") in (None, "1", "3")
        assert flags.get("--concurrency") in (None, "1")
        assert "/" not in flags.get("--name", "x")
    else:
        assert status == 2 and errors.strip()
        if errors.startswith("tune.py: "):  # tyro draws boxes
            assert len(errors.splitlines()) == 1

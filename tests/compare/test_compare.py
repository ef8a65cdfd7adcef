"""`cbnerf compare` end to end, on scenes of 32x24 pixels."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cbnerf.cli import main
from cbnerf.compare.protocols import released_psnr
from cbnerf.compare.report import REPORT_FILES
from cbnerf.data.library import DATA_VARIABLE, make_capture
from cbnerf.data.llff import write_capture
from cbnerf.data.renders import load_renders
from cbnerf.nerf.model import AUTO_PRECISION
from cbnerf.overrides import load_config, save_config, with_overrides
from cbnerf.presets import preset
from cbnerf.training.evaluation import mean_score, score_views

KNOBS = [
    "data.width=32", "field.num_coarse_samples=8", "field.num_fine_samples=4",
    "field.optim.steps=2", "field.optim.batch_size=16", "refiner.optim.steps=4",
    "refiner.optim.evaluations=2", "refiner.patch_size=8", "refiner.references=2",
    "codebook.size=16",
]  # fmt: skip


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    """Shared by the tests, so that each field is trained once."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """LLFF folders under names of the paper's scenes."""
    root = tmp_path_factory.mktemp("photographs")
    for name, scene in (("fern", "mosaic"), ("horns", "arcade")):
        write_capture(root / name, make_capture(scene, width=32, num_views=10))
    return root


@pytest.fixture
def compare(storage: Path, capsys, monkeypatch):
    """Runs the command; gives its report as plain values, its folder and its output."""
    monkeypatch.delenv(DATA_VARIABLE, raising=False)

    def run(*arguments: str) -> tuple[dict, Path, str]:
        monkeypatch.chdir(storage)
        main(["compare", "--resolution=tiny", f"--storage={storage}", *arguments,
              "--knobs", *KNOBS])  # fmt: skip
        printed = capsys.readouterr().out
        found = re.search(r"report +(\S+)/report.html", printed)
        assert found
        folder = Path(found[1])
        return json.loads((folder / "report.json").read_text(encoding="utf-8")), folder, printed

    return run


def renders_of(storage: Path, method: str, scene: str):
    """Stage-1 renders of a method, found by the knobs that stand beside them."""
    kind = preset(method, "tiny").field
    for folder in storage.glob(f"cache/field-{scene}-*"):
        config = load_config(folder / "config.yaml")
        if (config.field.kind, config.field.super_sampling) == (kind.kind, kind.super_sampling):
            return load_renders(folder / "renders.npz").rgb
    raise AssertionError(method)


def test_all_methods_are_scored_and_reported(compare, storage: Path, photographs: Path):
    report, folder, printed = compare(f"--data={photographs}", "--scenes=fern")
    assert {file.name for file in folder.iterdir()} == set(REPORT_FILES)
    assert report["protocol"] == "holdout" and report["published"] == {}
    images = make_capture("mosaic", width=32, num_views=10).images
    for row, method in (("nerf", "nerf"), ("nerf-sr stage 1", "nerf-sr"),
                        ("cb-nerf stage 1", "cb-nerf")):  # fmt: skip
        renders = renders_of(storage, method, "fern")
        expected = mean_score(score_views(renders[[0, 8]], images[[0, 8]], perceptual=True))
        entry = report["rows"][row]
        known = {metric: value for metric, value in expected._asdict().items() if value is not None}
        assert entry["mean"] == pytest.approx(known)
        assert list(entry["scenes"]["fern"]["views"]) == ["0", "8"]
        assert len(entry["scenes"]["fern"]["costs"]) == 1
    for entry in report["rows"].values():
        views = list(entry["scenes"]["fern"]["views"].values())
        assert entry["mean"]["psnr"] == pytest.approx(sum(v["psnr"] for v in views) / 2)
        assert all(cost["parameters"] > 0 for cost in entry["scenes"]["fern"]["costs"])
    means = {name: entry["mean"]["psnr"] for name, entry in report["rows"].items()}
    # Which of them is better says nothing after so few steps.
    assert means["linear"] != pytest.approx(means["cb-nerf stage 1"], abs=1e-3)
    text, page = (
        (folder / f"report.{suffix}").read_text(encoding="utf-8") for suffix in ("md", "html")
    )
    for name, mean in means.items():
        for written in (text, page, (folder / "tables.tex").read_text(encoding="utf-8"), printed):
            assert name in written and f"{mean:.2f}" in written
    assert "LPIPS" in text and page.count("data:image/png") == 2
    others = ("bicubic", "lanczos")
    systems = [r for r in report["rows"] if not r.endswith(others) and not r.startswith("vq-vae")]
    shown = re.findall(r'data-name="(.*?)"', page)
    assert shown == [*systems, "photograph"] and page.count("data:image/webp") == len(shown)
    for file in ("crops.png", "errors.png"):
        picture = np.asarray(Image.open(folder / file))
        assert picture.shape[0] > 150 and picture.std() > 10


def test_a_comparison_given_again_trains_nothing(compare, photographs: Path):
    arguments = (f"--data={photographs}", "--scenes=fern", "--methods=cb-nerf,linear")
    before, _, _ = compare(*arguments)
    after, _, printed = compare(*arguments)
    assert after == before and "trained" not in printed


def test_a_finished_comparison_reads_only_the_checkpoints_that_make_images(
    compare, photographs: Path, monkeypatch
):
    arguments = (f"--data={photographs}", "--scenes=fern,horns", "--methods=cb-nerf,linear")
    before, _, _ = compare(*arguments)
    load, read = torch.load, []

    def spy(path: Path, **keywords):
        read.append(path)
        return load(path, **keywords)

    monkeypatch.setattr("torch.load", spy)
    after, _, _ = compare(*arguments)
    assert after == before
    images_of_a_refiner = ("cb-nerf", "linear")
    assert len(read) == 2 * len(images_of_a_refiner)
    assert {path.name for path in read} == {"refiner.pt"}  # renders of fields are kept


def test_the_report_names_the_precision_of_stage_1(
    compare, photographs: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = (f"--data={photographs}", "--scenes=fern", "--methods=linear")
    for precision in ("bfloat16", "float32"):
        monkeypatch.setenv(AUTO_PRECISION, precision)
        report, folder, _ = compare(*arguments)
        assert report["precision"] == precision
        assert report["methods"]["linear"]["field.precision"] == precision
        for name in ("report.md", "report.html"):
            assert f"Precision of stage 1: {precision}." in (folder / name).read_text(
                encoding="utf-8"
            )


def test_table1_is_the_best_view_of_all_evaluations(compare, storage: Path, photographs: Path):
    arguments = (f"--data={photographs}", "--scenes=fern,horns", "--protocol=table1",
                 "--methods=cb-nerf,nerf-sr,linear")  # fmt: skip
    report, folder, _ = compare(*arguments)
    for name, entry in report["rows"].items():
        assert set(entry["mean"]) == {"psnr_table1"}, name
        for scene in entry["scenes"].values():
            views = [view["psnr_table1"] for view in scene["views"].values()]
            assert len(views) == 10 and scene["summary"]["psnr_table1"] >= max(views)
    stage_1 = report["rows"]["cb-nerf stage 1"]["scenes"]["fern"]
    assert stage_1["summary"]["psnr_table1"] == max(
        view["psnr_table1"] for view in stage_1["views"].values()
    )
    for refiner in storage.glob("cache/refiner-*-*/table1.json"):
        steps = load_config(refiner.parent / "config.yaml").refiner.kind == "linear" or [2, 4]
        history = json.loads(refiner.read_text(encoding="utf-8"))
        assert steps is True or list(map(int, history)) == steps
    assert report["published"] == {
        "NeRF-SR": {"fern": 19.70, "horns": 24.93},
        "Codebook-NeRF": {"fern": 20.45, "horns": 24.97},
    }
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert re.search(r"Codebook-NeRF, the paper's Table 1 \| +20.45 \| +24.97 \| +22.71", text)
    assert "6.02 dB" in text and "SSIM" not in text


def test_table1_resumes_after_a_kill_between_a_checkpoint_and_its_score(
    compare, storage: Path, photographs: Path
):
    arguments = (f"--data={photographs}", "--scenes=fern", "--protocol=table1", "--methods=cb-nerf")
    whole, _, _ = compare(*arguments)
    histories = list(storage.glob("cache/refiner-fern-*/table1.json"))
    (history,) = [
        file for file in histories
        if load_config(file.parent / "config.yaml").refiner.kind == "residual"
    ]  # fmt: skip
    scores = json.loads(history.read_text(encoding="utf-8"))
    history.write_text(json.dumps({"2": scores["2"]}), encoding="utf-8")
    (history.parent / "manifest.json").unlink()
    again, _, _ = compare(*arguments)
    assert json.loads(history.read_text(encoding="utf-8")) == scores
    assert again["rows"]["cb-nerf"]["mean"] == whole["rows"]["cb-nerf"]["mean"]


def test_an_unseen_scene_is_refined_by_what_others_taught(compare, photographs: Path):
    data = f"--data={photographs}"
    report, folder, _ = compare(
        data, "--scenes=fern,horns", "--protocol=unseen-scene", "--methods=cb-nerf,linear,nerf-sr"
    )
    own, _, _ = compare(data, "--scenes=fern,horns", "--methods=cb-nerf,linear,nerf-sr")
    assert set(own["rows"]) - set(report["rows"]) == {"nerf-sr"}
    assert "nerf-sr has no row of its own" in (folder / "report.md").read_text(encoding="utf-8")
    for row in ("cb-nerf stage 1", "nerf-sr stage 1"):
        assert report["rows"][row]["mean"] == own["rows"][row]["mean"]
    assert report["rows"]["linear"]["mean"] != own["rows"]["linear"]["mean"]


def test_low_res_photographs_alone_can_teach_a_refiner(compare, storage: Path, photographs: Path):
    arguments = (f"--data={photographs}", "--scenes=fern", "--methods=cb-nerf,linear,nerf-sr")
    report, _, printed = compare(*arguments, "--protocol=low-res-only")
    own, _, _ = compare(*arguments)
    assert set(own["rows"]) - set(report["rows"]) == {"nerf-sr"}
    assert report["rows"]["cb-nerf stage 1"]["mean"] == own["rows"]["cb-nerf stage 1"]["mean"]
    assert report["rows"]["linear"]["mean"] != own["rows"]["linear"]["mean"]
    assert "fern@low-res: stage 1 of cb-nerf trained" in printed
    assert "fern@low-res: stage 1 of nerf-sr" not in printed
    (below,) = storage.glob("cache/field-fern@low-res-*")
    assert load_renders(below / "renders.npz").rgb.shape == (10, 12, 16, 3)
    _, _, printed = compare(*arguments, "--protocol=low-res-only")
    assert "trained" not in printed


def test_scenes_can_share_a_codebook(compare, storage: Path, photographs: Path, tmp_path: Path):
    shared = with_overrides(preset("cb-nerf", "tiny"), {"codebook.shared": True})
    save_config(shared, tmp_path / "shared.yaml")
    arguments = (f"--data={photographs}", f"--methods=cb-nerf,{tmp_path}/shared.yaml")
    report, _, printed = compare(*arguments, "--scenes=horns,fern")
    row = f"{tmp_path.name} shared"
    assert f"fern, horns: stage 2 of {row} trained" in printed
    assert printed.count(f"stage 2 of {row}") == 1
    assert len(list(storage.glob("cache/refiner-all-*"))) == 1
    assert report["rows"][row]["scenes"].keys() == {"fern", "horns"}
    assert report["rows"][row]["mean"] != report["rows"]["cb-nerf"]["mean"]
    _, _, printed = compare(*arguments, "--scenes=fern,horns")
    assert "trained" not in printed


def test_a_file_is_a_method_too(compare, photographs: Path, tmp_path: Path):
    (tmp_path / "tuned").mkdir()
    config = with_overrides(preset("cb-nerf", "tiny"), {"codebook.beta": 1.0})
    save_config(config, tmp_path / "tuned" / "best.yaml")
    report, _, _ = compare(
        f"--data={photographs}", "--scenes=fern", f"--methods=cb-nerf,{tmp_path}/tuned/best.yaml"
    )
    assert list(report["rows"]) == [
        "photograph bicubic", "cb-nerf bicubic", "cb-nerf stage 1", "cb-nerf", "tuned best"
    ]  # fmt: skip
    assert report["methods"]["tuned best"]["codebook.beta"] == 1.0


def test_built_in_scenes_say_that_they_compare_with_nothing(compare):
    report, folder, _ = compare("--scenes=mosaic", "--protocol=table1", "--methods=linear")
    assert report["published"] == {}
    assert "not comparable with the paper" in (folder / "report.md").read_text(encoding="utf-8")


MISTAKES = {
    "unknown method": (["--methods=nerv"], "unknown method 'nerv'"),
    "method twice": (["--methods=nerf,nerf"], "'nerf' is named twice"),
    "unknown scene": (["--scenes=fern"], "no scene 'fern' in the built-in scenes"),
    "one scene alone": (
        ["--protocol=unseen-scene", "--scenes=mosaic"], "needs at least 2 scenes"
    ),
    "no knob": (["--knobs", "much"], "--knobs 'much' is not NAME=VALUE"),
    "unknown knob": (["--knobs", "codebook.sise=3"], "unknown knob 'codebook.sise'"),
    "no such file": (["--methods=nowhere/best.yaml"], "nowhere/best.yaml: no such file"),
    "shared for table1": (
        ["--protocol=table1", "--methods=cb-nerf", "--knobs", "codebook.shared=true"],
        "cb-nerf has codebook.shared, but table1",
    ),
    "shared without photographs": (
        ["--methods=nerf-sr", "--knobs", "codebook.shared=true"],
        "codebook.shared = True must be false with refiner.kind = reference",
    ),
    "other images": (["--methods=linear,{other}"], "give --resolution"),
    "no test views": (
        ["--knobs", "data.test_every=0", "data.validation=false"], "leaves no view to score"
    ),
    "too few views": (
        ["--knobs", "data.test_every=30"], "or set --knobs data.test_every=25"
    ),
    "a half knob": (["--knobs", "field.optim.steps=[1"], "not readable as YAML"),
    "a file as output": (["--output={other}"], "not a folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_ends_in_one_line_before_anything_is_trained(
    case: str, tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    save_config(preset("linear", "x2-252"), tmp_path / "other.yaml")
    arguments, message = MISTAKES[case]
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--resolution=tiny",
              *(a.format(other=tmp_path / "other.yaml") for a in arguments)])  # fmt: skip
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("cbnerf: ") and message in line and line.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["other.yaml"]


def test_released_psnr_of_a_row_is_that_of_its_images(compare, storage: Path, photographs: Path):
    report, _, _ = compare(
        f"--data={photographs}", "--scenes=horns", "--protocol=table1", "--methods=linear"
    )
    images = make_capture("arcade", width=32, num_views=10).images
    views = report["rows"]["linear stage 1"]["scenes"]["horns"]["views"]
    candidates = [
        load_renders(folder / "renders.npz").rgb
        for folder in storage.glob("cache/field-horns-*")
        if load_config(folder / "config.yaml").data.test_every == 0
        and load_config(folder / "config.yaml").field.kind == "planes"
    ]
    (renders,) = candidates
    assert [view["psnr_table1"] for view in views.values()] == pytest.approx(
        [released_psnr(a, b) for a, b in zip(renders, images, strict=True)]
    )

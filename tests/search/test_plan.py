from collections.abc import Callable
from pathlib import Path

import pytest

from cbnerf.scenes import BUILT_IN_SCENES
from cbnerf.search.plan import Plan, make_plan
from cbnerf.search.spec import parse_spec

pytestmark = pytest.mark.search

SPEC = parse_spec({"space": {"codebook.size": {"choices": [64, 1024]}}})


def make_folder(root: Path, *scenes: str) -> Path:
    for scene in scenes:
        (root / scene).mkdir(parents=True)
        (root / scene / "poses_bounds.npy").write_bytes(b"")
    return root


def plan_of(data: Path | None = None, **arguments) -> Plan:
    given = {"scenes": "all", "name": None, "storage": Path("runs"), "has_gpu": False} | arguments
    return make_plan(SPEC, data=data, **given)


def test_data_comes_from_the_flag_then_the_variable_then_the_usual_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    flag, variable = make_folder(tmp_path / "flag", "fern"), make_folder(tmp_path / "var", "horns")
    usual = tmp_path / "data" / "nerf_llff_data"
    assert plan_of().data is None
    assert plan_of().scenes == BUILT_IN_SCENES
    make_folder(usual, "trex")
    assert (plan_of().data, plan_of().scenes) == (usual, ("trex",))
    monkeypatch.setenv("CBNERF_DATA", str(variable))
    assert (plan_of().data, plan_of().scenes) == (variable, ("horns",))
    assert (plan_of(flag).data, plan_of(flag).scenes) == (flag, ("fern",))


def test_data_that_was_asked_for_must_hold_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_folder(tmp_path / "data" / "nerf_llff_data", "trex")
    (tmp_path / "empty").mkdir()
    for asked in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(ValueError, match=f"{asked}: no scenes"):
            plan_of(asked)
        monkeypatch.setenv("CBNERF_DATA", str(asked))
        with pytest.raises(ValueError, match=f"{asked}: no scenes"):
            plan_of()
        monkeypatch.delenv("CBNERF_DATA")


def test_auto_follows_the_machine(tiny_plan: Callable[..., Plan]):
    laptop, cluster = plan_of(), plan_of(has_gpu=True)
    assert (laptop.resolution, laptop.base.data.width, laptop.gpus_per_worker) == ("x2-128", 128, 0)
    assert (cluster.resolution, cluster.base.data.width) == ("x2-504", 504)
    assert cluster.gpus_per_worker == 0.25
    told = tiny_plan(has_gpu=True, resources={"gpus_per_worker": 1})
    assert (told.resolution, told.gpus_per_worker) == ("tiny", 1)


@pytest.mark.parametrize(("workers", "gpus"), [(1, 0.25), (2, 1), (4, 1)])
def test_workers_that_train_together_have_a_whole_gpu_each(tiny_plan, workers: int, gpus: float):
    about = {"resources": {"workers": workers}, "fixed": {"refiner.optim.batch_size": 8}}
    assert tiny_plan(has_gpu=True, **about).gpus_per_worker == gpus
    assert tiny_plan(has_gpu=False, **about).gpus_per_worker == 0


def test_a_study_is_named_by_what_it_computes():
    assert plan_of().name == "cb-nerf-x2-128-all"
    assert plan_of(scenes="arcade, blinds").name == "cb-nerf-x2-128-arcade-blinds"
    assert plan_of(name="mine").folder == Path("runs").resolve() / "studies" / "mine"


@pytest.mark.parametrize("name", ["a/b", "..", "../up", "/root", "."])
def test_a_name_stays_inside_the_folder_of_studies(name: str):
    with pytest.raises(ValueError, match="not the name of a folder"):
        plan_of(name=name)


def test_a_batch_must_split_over_the_workers(tiny_plan: Callable[..., Plan]):
    tiny_plan(resources={"workers": 1}, fixed={"refiner.optim.batch_size": 3})
    tiny_plan(resources={"workers": 2}, fixed={"refiner.optim.batch_size": 6})
    alternating = {"refiner.skips": "mixed", "refiner.optim.batch_size": 6}
    with pytest.raises(ValueError, match=r"refiner\.optim\.batch_size = 6 must be a multiple of 4"):
        tiny_plan(method="cb-nerf-paper", resources={"workers": 2}, fixed=alternating)
    with pytest.raises(ValueError, match=r"field\.optim\.batch_size = 64 must be a multiple of 3"):
        tiny_plan(resources={"workers": 3})


def test_a_batch_must_split_over_each_number_of_workers_of_an_elastic_group(
    tiny_plan: Callable[..., Plan],
):
    group = {"resources": {"workers": [1, 4]}}
    sizes = {"field.optim.batch_size": 24, "refiner.optim.batch_size": 12}
    assert tiny_plan(**group, fixed=sizes).gpus_per_worker == 0
    with pytest.raises(ValueError, match=r"= 64 must be a multiple of 12 with .* = \[1, 4\]$"):
        tiny_plan(**group)
    space = {"field.optim.batch_size": {"choices": [12, 24]}}
    with pytest.raises(ValueError, match=r"batch_size cannot be searched with .* = \[1, 4\]"):
        tiny_plan(**group, space=space)


def test_the_base_holds_the_fixed_knobs(tiny_plan: Callable[..., Plan]):
    plan = tiny_plan(fixed={"codebook.dim": 5})
    assert plan.base.codebook.dim == 5


def test_rungs_are_shares_of_a_training_and_end_with_all_of_it(tiny_plan: Callable[..., Plan]):
    plan = tiny_plan(fixed={"refiner.optim.steps": 900})
    assert [plan.part(rung) for rung in range(plan.rungs)] == [9, 3, 1]
    for stopping in ({"rule": "none"}, {"rungs": 1}):
        flat = tiny_plan(fixed={"refiner.optim.steps": 90}, stopping=stopping)
        assert flat.rungs == 1 and flat.part(0) == 1


def test_no_rung_is_shorter_than_the_grace_period(tiny_plan: Callable[..., Plan]):
    for steps, rungs in ((899, 2), (300, 2), (299, 1), (50, 1)):
        assert tiny_plan(fixed={"refiner.optim.steps": steps}).rungs == rungs


def test_a_method_without_stage_2_searches_stage_1(tiny_plan: Callable[..., Plan]):
    space = {"field.optim.lr": {"low": 1e-3, "high": 1e-1, "log": True}}
    plan = tiny_plan(method="nerf", space=space, fixed={"field.optim.steps": 945})
    assert plan.stage == "field" and not plan.shares_fields
    assert plan.rungs == 3
    assert not tiny_plan(space=space).shares_fields and tiny_plan().shares_fields
    with pytest.raises(ValueError, match=r"codebook\.size is a knob of stage 2"):
        tiny_plan(method="nerf")
    with pytest.raises(ValueError, match="`none` has no stage 2"):
        tiny_plan(space={"refiner.kind": {"choices": ["residual", "none"]}})


def test_a_shared_codebook_is_one_training_of_all_scenes(tiny_plan: Callable[..., Plan]):
    plan = tiny_plan("arcade,blinds", fixed={"codebook.shared": True})
    assert plan.trainings == ("all",) and plan.scenes_of("all") == ("arcade", "blinds")
    assert plan.training_of("blinds", plan.base) == "all"
    alone = tiny_plan("arcade,blinds")
    assert alone.trainings == alone.scenes and alone.scenes_of("blinds") == ("blinds",)
    with pytest.raises(ValueError, match=r"codebook\.shared decides what is trained"):
        tiny_plan(space={"codebook.shared": {"choices": [True, False]}})


def test_auto_is_no_precision_to_search(tiny_plan: Callable[..., Plan]):
    named = {"field.precision": {"choices": ["bfloat16", "float32"]}}
    assert tiny_plan(space=named).with_precision("float32").base.field.precision == "float32"
    with pytest.raises(ValueError, match=r"field\.precision: `auto` differs between machines"):
        tiny_plan(space={"field.precision": {"choices": ["auto", "float32"]}})


@pytest.mark.parametrize(
    ("method", "fixed", "message"),
    [
        ("linear", {}, "codebook.size changes nothing in linear"),
        ("nerf-sr", {}, "codebook.size changes nothing in nerf-sr"),
        ("cb-nerf", {"refiner.patch_size": 128}, "does not fit into images 64 pixels wide"),
    ],
)
def test_what_cannot_be_searched_is_refused(tiny_plan, method: str, fixed: dict, message: str):
    with pytest.raises(ValueError, match=message):
        tiny_plan(method=method, fixed=fixed, space={"codebook.size": {"choices": [64, 256]}})

"""Real processes on gloo: they train on the batches of one, and end where one ends."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_two_ranks

from cbnerf.config import Config, KnobError
from cbnerf.data.renders import Renders
from cbnerf.data.scene import Scene
from cbnerf.overrides import with_overrides
from cbnerf.training.distributed import from_rank_0
from cbnerf.training.field import train_field
from cbnerf.training.refiner import train_refiner
from cbnerf.training.stages import run_field, run_refiner

CPU = torch.device("cpu")
PATIENCE = timedelta(minutes=5)
"""After which processes that wait for each other count as hanging."""
SCHEDULE = {"field.precision": "float32", "field.optim.steps": 6, "field.optim.evaluations": 2,
            "refiner.optim.steps": 6, "refiner.optim.batch_size": 4,
            "refiner.optim.evaluations": 2}  # fmt: skip


def train_both(config: Config, scene: Scene, renders: Renders) -> tuple[dict, list[dict]]:
    """States of field and refiner, and what was reported."""
    reports = []

    def report(step, metrics, checkpoint) -> None:
        reports.append({"step": step, **metrics})

    field = train_field(config, scene, device=CPU, report=report)
    refiner = train_refiner(config, scene, renders, device=CPU, report=report)
    states = {"field": field.state_dict(), "refiner": refiner.state_dict()}
    return states, reports


def join(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=PATIENCE
    )


def leave() -> None:
    dist.barrier()  # nobody leaves while another still talks
    dist.destroy_process_group()


def train_on_rank(rank: int, folder: str, *job) -> None:
    join(rank, Path(folder))
    torch.save(train_both(*job), f"{folder}/{rank}.pt")
    leave()


def test_two_processes_train_as_one(
    tiny_config: Config, tiny_scene: Scene, tiny_renders: Renders, tmp_path: Path
):
    config = with_overrides(tiny_config, SCHEDULE | {"codebook.ema": True})
    assert config.codebook.kmeans_init and config.refiner.skips == "mixed"
    job = config, tiny_scene, tiny_renders
    on_two_ranks(train_on_rank, str(tmp_path), *job)
    (first, reports), (second, silent) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone, expected_reports = train_both(*job)
    for stage, state in alone.items():
        for name, expected in state.items():
            assert torch.equal(first[stage][name], second[stage][name]), name
            torch.testing.assert_close(first[stage][name], expected, atol=2e-4, rtol=2e-3, msg=name)
    # Rank 0 scores, the others only wait; its loss is that of its own rows.
    assert [set(report) for report in silent] == [{"step"}] * 4
    for report, expected in zip(reports, expected_reports, strict=True):
        assert report["val/psnr"] == pytest.approx(expected["val/psnr"], abs=0.02)


def run_stages(
    config: Config, scene: Scene, renders: Renders, folder: Path, part: int
) -> list[dict[str, float]]:
    """Both stages in folders of their names; their metrics but for the seconds."""
    about = {"device": CPU, "part": part}
    metrics = [
        run_field(config, scene, folder / "field", **about),
        run_refiner(config, scene, renders, folder / "refiner", **about),
    ]
    return [{name: v for name, v in of_stage.items() if name != "seconds"} for of_stage in metrics]


def resume_on_rank(
    rank: int, views: list[Path], config: Config, scene: Scene, renders: Renders
) -> None:
    """Half of a training, the rest of it, and once more; `views` is where each process looks."""
    join(rank, views[0])
    run_stages(config, scene, renders, views[0], 2)
    dist.barrier()  # what has been written is now hidden from a process that looks elsewhere
    told = [run_stages(config, scene, renders, views[rank], 1) for _ in range(2)]
    torch.save(told, views[0] / f"{rank}.pt")
    other_seed = with_overrides(config, {"seed": 1})
    with pytest.raises(ValueError, match="finished with other knobs"):
        run_field(other_seed, scene, views[rank] / "field", device=CPU)
    leave()


def test_processes_go_by_what_rank_0_sees(
    tiny_config: Config, tiny_scene: Scene, tiny_renders: Renders, tmp_path: Path
):
    """On NFS a machine may not see yet what another has written: rank 1 looks into a folder that
    stays empty, and all ends bit for bit as if it saw everything."""
    config = with_overrides(tiny_config, SCHEDULE)
    for looks in (["all", "all"], ["one", "nothing"]):
        views = [tmp_path / look for look in looks]
        for view in views:
            view.mkdir(exist_ok=True)
        on_two_ranks(resume_on_rank, views, config, tiny_scene, tiny_renders)
    assert not list((tmp_path / "nothing").iterdir())
    for stage in ("field", "refiner"):
        seen, hidden = (
            torch.load(tmp_path / name / stage / f"{stage}.pt") for name in ("all", "one")
        )
        assert seen["step"] == hidden["step"] == 6
        torch.testing.assert_close(seen["model"], hidden["model"], rtol=0, atol=0)
        torch.testing.assert_close(seen["optimizer"], hidden["optimizer"], rtol=0, atol=0)
    expected, *others = (
        torch.load(tmp_path / name / f"{rank}.pt") for name in ("all", "one") for rank in (0, 1)
    )
    assert all("val/psnr" in metrics for metrics in expected[0])
    assert others[1] == expected
    assert all(told[1] == expected[1] for told in others), "the finished folder is rank 0's"


def fail_on_rank(rank: int, folder: Path) -> None:
    join(rank, folder)

    def ask() -> int:
        if rank == 0:
            raise KnobError("3 is odd")
        raise AssertionError("only rank 0 is asked")

    with pytest.raises(KnobError, match="3 is odd"):
        from_rank_0(ask)
    assert from_rank_0(lambda: rank) == 0
    leave()


def test_what_rank_0_cannot_find_out_is_an_error_of_all(tmp_path: Path):
    on_two_ranks(fail_on_rank, tmp_path)
    assert from_rank_0(lambda: "alone") == "alone"

"""Real processes on gloo: they train on the batches of one, and end where one ends."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from cbnerf.config import Config, with_overrides
from cbnerf.data.renders import Renders
from cbnerf.data.scene import Scene
from cbnerf.training.field import train_field
from cbnerf.training.refiner import train_refiner

CPU = torch.device("cpu")


def train_both(config: Config, scene: Scene, renders: Renders) -> tuple[dict, list[dict]]:
    """States of field and refiner, and what was reported."""
    reports = []

    def report(step, metrics, checkpoint) -> None:
        reports.append({"step": step, **metrics})

    field = train_field(config, scene, device=CPU, report=report)
    refiner = train_refiner(config, scene, renders, device=CPU, report=report)
    states = {"field": field.state_dict(), "refiner": refiner.state_dict()}
    return states, reports


def train_on_rank(rank: int, folder: str, *job) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(train_both(*job), f"{folder}/{rank}.pt")
    dist.barrier()  # nobody leaves while another still talks
    dist.destroy_process_group()


def test_two_processes_train_as_one(
    tiny_config: Config, tiny_scene: Scene, tiny_renders: Renders, tmp_path: Path
):
    schedule = {"field.precision": "float32", "field.optim.steps": 6,
                "field.optim.evaluations": 2, "refiner.optim.steps": 6,
                "refiner.optim.batch_size": 4, "refiner.optim.evaluations": 2}  # fmt: skip
    config = with_overrides(tiny_config, schedule)
    assert config.codebook.ema and config.codebook.kmeans_init and config.refiner.skips == "mixed"
    job = config, tiny_scene, tiny_renders
    spawn(train_on_rank, (str(tmp_path), *job), nprocs=2)
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

"""What `field.precision: auto` is in a study: a machine that trains is asked, not the driver."""

from collections.abc import Callable

import pytest
import ray
import torch

from cbnerf.nerf.model import AUTO_PRECISION, multiplies_bfloat16
from cbnerf.search.driver import find_precision
from cbnerf.search.plan import Plan
from cbnerf.search.worker import run_base_field
from cbnerf.training.checkpoint import load_checkpoint

pytestmark = pytest.mark.search
CPU = torch.device("cpu")


@pytest.fixture
def other_workers(monkeypatch: pytest.MonkeyPatch):
    """A Ray whose workers have another precision of their own than this machine."""
    monkeypatch.delenv(AUTO_PRECISION, raising=False)
    other = "float32" if multiplies_bfloat16(CPU) else "bfloat16"
    ray.init(
        address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": {AUTO_PRECISION: other}},
    )  # fmt: skip
    yield other
    ray.shutdown()


def test_workers_decide_and_then_keep_to_it(
    other_workers: str, tiny_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
):
    plan = tiny_plan("arcade", fixed={"field.optim.steps": 2})
    assert find_precision(plan) == other_workers
    kept = "float32" if other_workers == "bfloat16" else "bfloat16"
    settled = plan.with_precision(kept)
    assert find_precision(settled) == kept
    train = ray.remote(run_base_field)
    folders = [ray.get(train.remote(one, "arcade"))[0] for one in (settled, plan)]
    found = [load_checkpoint(folder / "field.pt", "field", CPU).precision for folder in folders]
    assert found == [kept, other_workers] and folders[0] != folders[1]
    monkeypatch.setenv(AUTO_PRECISION, kept)  # The driver's word reaches machines far away, too.
    assert find_precision(plan) == kept


def test_a_local_ray_inherits_the_variable(
    tiny_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
):
    other = "float32" if multiplies_bfloat16(CPU) else "bfloat16"
    monkeypatch.setenv(AUTO_PRECISION, other)
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        monkeypatch.delenv(AUTO_PRECISION)
        assert find_precision(tiny_plan("arcade")) == other
    finally:
        ray.shutdown()

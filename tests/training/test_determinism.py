"""`deterministic`: no operation of a training adds in an order that a GPU does not fix.

CUDA is not needed to see it: torch documents which operations it cannot do in a fixed order there,
and what is dispatched does not depend on the device, but for the branches that ask for it.
"""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cbnerf.config import Config
from cbnerf.data.renders import Renders
from cbnerf.data.scene import Scene
from cbnerf.overrides import with_overrides
from cbnerf.presets import preset
from cbnerf.training.field import train_field
from cbnerf.training.refiner import train_refiner
from cbnerf.training.stages import ignore

CPU = torch.device("cpu")
FAST = {
    "deterministic": True, "field.optim.steps": 2, "field.optim.evaluations": 1,
    "field.num_coarse_samples": 8, "field.num_fine_samples": 4, "refiner.optim.steps": 2,
    "refiner.optim.evaluations": 1,
}  # fmt: skip
# `torch.use_deterministic_algorithms` refuses these on CUDA tensors.
UNORDERED = {
    "avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward",
    "adaptive_max_pool2d_backward", "fractional_max_pool2d_backward",
    "fractional_max_pool3d_backward", "max_unpool2d", "max_unpool3d",
    "upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward",
    "upsample_trilinear3d_backward", "_upsample_bilinear2d_aa_backward",
    "reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward",
    "nll_loss_forward", "nll_loss2d_forward", "_ctc_loss_backward", "put_", "put", "histc",
    "median", "kthvalue", "grid_sampler_2d_backward", "grid_sampler_3d_backward",
}  # fmt: skip
METHODS = {
    "nerf-sr": {}, "cb-nerf-paper": {}, "cb-nerf": {}, "cnn": {}, "linear": {},
    "cb-nerf with fsq": {"codebook.kind": "fsq", "codebook.imitation": "feature"},
    "cb-nerf with gradients": {"codebook.ema": False, "codebook.imitation": "vq"},
}  # fmt: skip


class Recorder(TorchDispatchMode):
    """Notes operations without a fixed order."""

    def __init__(self):
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        adds_floats = name in ("cumsum", "cumsum_") and args[0].is_floating_point()
        weighs = name == "bincount" and len(args) > 1 and args[1] is not None
        if name in UNORDERED or adds_floats or weighs:
            self.found.add(name)
        return func(*args, **kwargs or {})


def make_config(name: str) -> Config:
    return with_overrides(preset(name.split()[0], "tiny"), FAST | METHODS.get(name, {}))


def test_the_recorder_sees_forward_and_backward():
    grid = torch.zeros(1, 4, 4, 2)
    image = torch.ones(1, 3, 8, 8, requires_grad=True)
    with Recorder() as recorder:
        torch.nn.functional.grid_sample(image, grid, align_corners=False).sum().backward()
        torch.ones(3).cumsum(0)
        torch.ones(3, dtype=torch.int64).cumsum(0)
    assert recorder.found == {"grid_sampler_2d_backward", "cumsum"}


@pytest.mark.parametrize("method", ["nerf", "nerf-sr", "cb-nerf"])
def test_stage_1_adds_in_a_fixed_order(method: str, tiny_scene: Scene):
    with Recorder() as recorder:
        train_field(make_config(method), tiny_scene, device=CPU, report=ignore)
    assert recorder.found == set()


@pytest.mark.parametrize("method", METHODS)
def test_stage_2_adds_in_a_fixed_order(method: str, tiny_scene: Scene, tiny_renders: Renders):
    with Recorder() as recorder:
        train_refiner(make_config(method), tiny_scene, tiny_renders, device=CPU, report=ignore)
    assert recorder.found == set()


@pytest.mark.parametrize("wanted", [False, True])
def test_torch_is_told_while_a_stage_trains_and_only_then(wanted: bool, tiny_scene: Scene):
    config = with_overrides(make_config("cb-nerf"), {"deterministic": wanted})
    told: list[bool] = []

    def look(step: int, metrics: dict[str, float], checkpoint: object, /) -> None:
        told.append(torch.are_deterministic_algorithms_enabled())

    train_field(config, tiny_scene, device=CPU, report=look)
    assert told == [wanted]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["nerf-sr", "cb-nerf-paper", "cb-nerf"])
def test_a_gpu_trains_to_the_same_bits(method: str, tiny_scene: Scene, tiny_renders: Renders):
    device, config = torch.device("cuda"), make_config(method)
    states = []
    for _ in range(2):
        field = train_field(config, tiny_scene, device=device, report=ignore)
        refiner = train_refiner(config, tiny_scene, tiny_renders, device=device, report=ignore)
        states.append(field.state_dict() | refiner.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name

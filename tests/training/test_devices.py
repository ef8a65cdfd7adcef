"""Both stages on a GPU that is not there: no operation mixes devices, no step waits for the GPU."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comparing import assert_same, assert_same_files
from fake_gpu import GPU, GpuTensor, fake_gpu
from test_determinism import METHODS, make_config

from cbnerf.config import Config
from cbnerf.data.renders import Renders
from cbnerf.data.scene import Scene
from cbnerf.overrides import with_overrides
from cbnerf.training.evaluation import refine_views
from cbnerf.training.field import train_field
from cbnerf.training.inspection import inspect_codebook
from cbnerf.training.refiner import train_refiner
from cbnerf.training.stages import ignore
from cbnerf.training.video import write_videos

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for CPUs round otherwise than the operations of torch that GPUs run, and Adam
    makes much of the last bits."""
    monkeypatch.setattr("cbnerf.kernels.HAS_NUMBA", False)


def make_steps(name: str, steps: int) -> Config:
    # What is allowed of a CUDA build of torch alone is not asked of this one.
    # And `auto` is one precision on the fake GPU and another on this CPU.
    knobs = {"deterministic": False, "field.precision": "float32", "field.optim.steps": steps,
             "refiner.optim.steps": steps}  # fmt: skip
    return with_overrides(make_config(name), knobs)


def assert_same_model(model: torch.nn.Module, other: torch.nn.Module) -> None:
    """The first one lies on the fake GPU, which computes as the CPU does."""
    on_gpu, on_cpu = model.state_dict(keep_vars=True), other.state_dict()
    assert on_gpu.keys() == on_cpu.keys()
    for name, value in on_gpu.items():
        assert value.device == GPU, name
        torch.testing.assert_close(value.inner, on_cpu[name].detach())


def test_the_fake_refuses_what_cuda_refuses():
    with fake_gpu() as waits:
        here, there = torch.ones(3), torch.ones(3, device=GPU)
        assert isinstance(there, GpuTensor) and there.device == GPU
        for mix in (
            lambda: here + there,
            lambda: torch.cat([here, there]),
            lambda: here.add_(there.sum()),
            lambda: here[there.long()],
            lambda: there.index_add_(0, torch.zeros(3, dtype=torch.int64), there),
        ):
            with pytest.raises(RuntimeError, match="two devices"):
                mix()
        with pytest.raises(TypeError):
            there.numpy()
        assert not waits
        assert (there * here.sum() + there[here.long()]).tolist() == [4, 4, 4]
        assert float(there.sum()) == 3
        assert waits == {"_to_copy": 1, "_local_scalar_dense": 1}


def check_training(method: str, train: Callable[..., torch.nn.Module]) -> None:
    """More steps are no more to wait for, and the result is that of the CPU."""
    waited: list[Counter[str]] = []
    for steps in (2, 3):
        with fake_gpu() as waits:
            model = train(make_steps(method, steps), device=GPU, report=ignore)
        waited.append(waits)
    assert waited[0] == waited[1] != {}
    assert_same_model(model, train(make_steps(method, 3), device=CPU, report=ignore))


@pytest.mark.parametrize("method", ["nerf", "nerf-sr", "cb-nerf"])
def test_stage_1(method: str, tiny_scene: Scene):
    check_training(method, lambda config, **how: train_field(config, tiny_scene, **how))


@pytest.mark.parametrize("method", METHODS)
def test_stage_2(method: str, tiny_scene: Scene, tiny_renders: Renders):
    pair = tiny_scene, tiny_renders
    check_training(method, lambda config, **how: train_refiner(config, *pair, **how))


@pytest.mark.parametrize("method", ["linear", "cnn"])
def test_stage_2_of_other_scenes(method: str, tiny_scene: Scene, tiny_renders: Renders):
    config, pair = make_steps(method, 2), (tiny_scene, tiny_renders)
    refiners = []
    with fake_gpu():
        refiners.append(train_refiner(config, *pair, device=GPU, report=ignore, sources=[pair] * 2))
    refiners.append(train_refiner(config, *pair, device=CPU, report=ignore, sources=[pair] * 2))
    assert_same_model(*refiners)


def test_pictures_and_videos(tiny_scene: Scene, tiny_renders: Renders, tmp_path: Path):
    written = []
    for device in (GPU, CPU):
        folder = tmp_path / device.type
        with fake_gpu():
            config = make_steps("cb-nerf", 1)
            field = train_field(config, tiny_scene, device=device, report=ignore)
            refiner = train_refiner(config, tiny_scene, tiny_renders, device=device, report=ignore)
            assert refiner.autoencoder is not None
            images = tiny_renders.of([0, 1]), tiny_scene.images[:2]
            health = inspect_codebook(refiner.autoencoder, *images, folder, device)
            cameras = tiny_scene.cameras(device)
            path = cameras._replace(camera_to_world=cameras.camera_to_world[:2])
            videos = write_videos(field, path, tiny_scene.scale, refiner, folder, fps=2)
            tiles = refine_views(refiner, tiny_renders.of([0]), device, tile=16)
        assert json.loads((folder / "video.json").read_text(encoding="utf-8")) == videos
        for file in (folder / "video.json", *folder.glob("*.mp4")):
            file.unlink()
        written.append((health, videos, tiles))
    for on_gpu, on_cpu in zip(written[0][:2], written[1][:2], strict=True):
        # The refiners were trained, and are equal but for rounding.
        assert on_gpu == pytest.approx(on_cpu, rel=1e-6)
    assert_same(written[0][2], written[1][2], "tiles")
    assert_same_files(tmp_path / GPU.type, tmp_path / CPU.type)
    assert len(list((tmp_path / CPU.type).glob("*.png"))) == 7


def test_stage_2_alone_multiplies_in_tf32_on_a_gpu(tiny_scene: Scene, tiny_renders: Renders):
    told: list[str] = []
    pair = tiny_scene, tiny_renders
    for deterministic, device in ((False, GPU), (True, GPU), (False, CPU)):
        config = with_overrides(make_steps("cb-nerf", 1), {"deterministic": deterministic})
        with fake_gpu(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "set_float32_matmul_precision", told.append)
            # What is allowed of a CUDA build alone.
            patch.setattr(torch, "use_deterministic_algorithms", lambda wanted: None)
            train_field(config, tiny_scene, device=device, report=ignore)
            assert set(told) == {"highest"}
            train_refiner(config, *pair, device=device, report=ignore)
        is_fast = device == GPU and not deterministic
        assert set(told) == ({"high", "highest"} if is_fast else {"highest"})
        assert told[-1] == "highest"
        told.clear()

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from comparing import shorten
from drawings import draw

from cbnerf.config import Config
from cbnerf.data import library
from cbnerf.data.renders import Renders
from cbnerf.data.scene import Capture, Scene, make_scene
from cbnerf.nerf.rays import Cameras
from cbnerf.nerf.warp import find_positions
from cbnerf.presets import preset

torch.set_num_threads(1)

if find_spec("ray") is None:  # the core is tested without the search extra, too
    collect_ignore = ["search", "test_tune_configs.py"]

LONGEST = [
    "test_ray_up.py", "test_kuberay.py", "test_study.py", "test_complete_searches.py",
    "test_faults.py",
    "test_distributed_trial.py", "test_command.py",
    "test_tasks.py", "test_machines.py", "test_cli.py",
    "test_train_refiner.py", "test_scenes.py",
    "test_worker.py", "test_spec_sweep.py",
    "test_searcher.py", "test_compare.py", "test_readme.py",
    "test_divergence.py", "test_devices.py",
    "test_precision.py", "test_stages.py", "test_effects.py", "test_mlflow_page.py",
]  # fmt: skip
"""Files that take long, the longest first."""

EXIT_STATUS = pytest.StashKey[int]()


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """Print the sizes and hashes of unequal files, not their bytes."""
    short = [shorten(left), shorten(right)]
    return [f"{short[0]!r} {op} {short[1]!r}"] if short != [left, right] else None


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # pytest-xdist would start files with many tests first.


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the files that take long first, so that no worker waits for another one at the end."""
    places = {file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[EXIT_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave without the destructors of C++ libraries once Ray was started in this process.

    After all tests had passed, a native thread was seen to read freed memory while the interpreter
    went down (one run of several; ip in libstdc++'s _Hash_bytes, no Python frame).
    """
    if "ray" in sys.modules and EXIT_STATUS in config.stash:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[EXIT_STATUS])


@pytest.fixture(scope="session", autouse=True)
def scenes_are_drawn_once() -> Iterator[None]:
    """Where the package itself draws a built-in scene, take that of `drawings`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "make_capture", draw)
        yield


@pytest.fixture(scope="session")
def tiny_config() -> Config:
    return preset("cb-nerf", "tiny")


@pytest.fixture(scope="session")
def tiny_capture() -> Capture:
    """Ten photographs of 64x48 pixels."""
    return draw("mosaic", width=64, num_views=10)


@pytest.fixture(scope="session")
def tiny_scene(tiny_capture: Capture, tiny_config: Config) -> Scene:
    return make_scene(tiny_capture, tiny_config.data)


@pytest.fixture(scope="session")
def tiny_cameras(tiny_scene: Scene) -> Cameras:
    return tiny_scene.cameras(torch.device("cpu"))


@pytest.fixture(scope="session")
def tiny_renders(tiny_scene: Scene, tiny_cameras: Cameras) -> Renders:
    """Stands in for stage 1: the photographs without their finest detail, on a plane."""
    images = tiny_scene.images.movedim(-1, 1).float()
    low_res = torch.nn.functional.avg_pool2d(images, 2)
    blurred = torch.nn.functional.interpolate(low_res, scale_factor=2, mode="bilinear")
    depth = torch.full(tiny_scene.images.shape[1:3], 0.5)
    places = [find_positions(tiny_cameras, depth, view) for view in range(tiny_scene.num_views)]
    colours = blurred.round().to(torch.uint8).movedim(1, -1).contiguous()
    return Renders(colours, torch.stack(places).half())

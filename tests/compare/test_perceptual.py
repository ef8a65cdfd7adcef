import importlib.util
from pathlib import Path

import pytest
import torch

from cbnerf.compare.perceptual import WEIGHTS_FILE, load_lpips

CPU = torch.device("cpu")


def test_without_weights_nothing_is_computed_for_a_reported_reason(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    distance, about = load_lpips(CPU)
    packages = ("torchvision", "torchmetrics")
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    missing = next(iter(absent), WEIGHTS_FILE)
    assert distance is None and "not reported" in about and missing in about
    assert not list(tmp_path.iterdir())  # nothing was downloaded


def test_with_weights_equal_images_are_nearest(tmp_path: Path, monkeypatch):
    pytest.importorskip("torchmetrics")
    models = pytest.importorskip("torchvision.models")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    assert models.VGG16_Weights.IMAGENET1K_V1.url.endswith(WEIGHTS_FILE)
    untrained = models.vgg16(weights=None).state_dict()
    torch.save(untrained, tmp_path / "hub" / "checkpoints" / WEIGHTS_FILE)
    distance, about = load_lpips(CPU)
    assert distance is not None and "VGG-16" in about
    image = torch.randint(0, 256, (40, 48, 3), dtype=torch.uint8)
    noise = 20 * torch.randn(40, 48, 3)
    little, much = ((image + f * noise).clamp(0, 255).to(torch.uint8) for f in (0.5, 2))
    assert distance(image, image) == 0 < distance(little, image) < distance(much, image)
    assert distance(much, image) == distance(much, image)  # views do not add up

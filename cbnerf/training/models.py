"""Build untrained refiners; load trained models of both stages from their checkpoints."""

from pathlib import Path

import torch

from cbnerf.baselines.cnn import CNNRefiner
from cbnerf.baselines.linear import LinearRefiner
from cbnerf.baselines.nerf_sr import ReferenceRefiner
from cbnerf.baselines.paper import PaperRefiner
from cbnerf.codebook.refiner import Refiner
from cbnerf.codebook.residual import ResidualRefiner
from cbnerf.config import Config
from cbnerf.nerf.model import FieldModel, build_field
from cbnerf.nerf.rays import Cameras
from cbnerf.training.checkpoint import load_checkpoint


def build_refiner(config: Config) -> Refiner:
    """The untrained refiner of `refiner.kind`."""
    match config.refiner.kind:
        case "paper":
            return PaperRefiner(config)
        case "residual":
            return ResidualRefiner(config)
        case "cnn":
            return CNNRefiner(config)
        case "reference":
            return ReferenceRefiner(config)
        case "linear":
            return LinearRefiner(config)
        case "none":
            raise ValueError("refiner.kind = none: this method ends with stage 1")


def count_parameters(config: Config) -> int:
    """Number of parameters of the refiner, including codes and filters."""
    with torch.random.fork_rng(devices=[]):
        return sum(parameter.numel() for parameter in build_refiner(config).parameters())


def load_field(path: Path, device: torch.device) -> tuple[FieldModel, Cameras, Config]:
    """A trained field with its cameras and configuration."""
    checkpoint = load_checkpoint(path, "field", device)
    if set(checkpoint.cameras) != set(Cameras._fields):
        raise ValueError(f"{path}: written by another version of cbnerf (cameras)")
    cameras = Cameras(**checkpoint.cameras)
    model = build_field(checkpoint.config, cameras).to(device)
    model.load_state_dict(checkpoint.model)
    return model.eval(), cameras, checkpoint.config


def load_refiner(path: Path, device: torch.device) -> Refiner:
    """A trained refiner."""
    checkpoint = load_checkpoint(path, "refiner", device)
    refiner = build_refiner(checkpoint.config).to(device)
    refiner.load_state_dict(checkpoint.model)
    return refiner.eval()

"""Stage 2: train a refiner on pairs of stage-1 render and photograph."""

from pathlib import Path

import torch
from torch import nn

from cbnerf.codebook.health import CodebookHealth
from cbnerf.codebook.refiner import Refiner, build_refiner, refiner_losses
from cbnerf.config import Config
from cbnerf.data.patches import PatchSampler
from cbnerf.data.renders import Renders
from cbnerf.data.scene import Scene
from cbnerf.data.splits import split_views
from cbnerf.noise import Noise
from cbnerf.training.checkpoint import load_checkpoint
from cbnerf.training.evaluation import mean_scores, refine_views
from cbnerf.training.loop import Losses, Report, Task, fit
from cbnerf.training.processes import num_processes


def train_refiner(
    config: Config,
    scene: Scene,
    renders: Renders,
    *,
    device: torch.device,
    report: Report,
    resume_from: Path | None = None,
) -> Refiner:
    """Train on the training views' photographs and renders; score refined validation views.

    Reports the losses as `train/...`, codebook health since the last report as `codebook/...` (of
    rank 0's patches), `val/psnr` (dB), `val/ssim`, and `val/gain` (dB), the change of PSNR against
    the stage-1 render.
    """
    split = split_views(scene.num_views, config.data)
    if num_processes() > 1 and config.refiner.optim.batch_size // num_processes() % 2:
        # `refiner.skips=mixed` alternates over rows, which must not depend on the processes.
        raise ValueError(
            f"refiner.optim.batch_size = {config.refiner.optim.batch_size} gives each of "
            f"{num_processes()} processes an odd number of patches; make it even"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        refiner = build_refiner(config).to(device)
    health = CodebookHealth(refiner.autoencoder.quantizer.num_codes, device)
    patches = PatchSampler(
        renders.rgb[split.train], scene.images[split.train], config.refiner.patch_size, device
    )

    def losses(wrapped: nn.Module, batch_size: int, noise: Noise) -> Losses:
        batch = patches.draw(batch_size, noise)
        refinement = wrapped(batch.sr, batch.high_res)
        health.add(refinement.high_res_indices, refinement.sr_indices)
        terms = refiner_losses(refinement, batch.high_res, config.loss)
        parts = {
            "train/loss": terms.total,
            "train/refine": terms.refine,
            "train/recon": terms.recon,
            "train/vq": terms.vq,
            "train/imitation": terms.imitation,
        }
        return Losses(terms.total, parts)

    before = mean_scores(renders.rgb[split.val], scene.images[split.val], "val")

    def evaluate() -> dict[str, float]:
        use = health.metrics()
        health.clear()
        if not split.val:
            return use
        refined = refine_views(refiner, renders.rgb[split.val], device)
        scores = mean_scores(refined, scene.images[split.val], "val")
        return use | scores | {"val/gain": scores["val/psnr"] - before["val/psnr"]}

    task = Task(
        stage="refiner",
        scene=scene.name,
        config=config,
        optim=config.refiner.optim,
        model=refiner,
        param_groups=[{"params": list(refiner.parameters()), "lr": config.refiner.optim.lr}],
        losses=losses,
        evaluate=evaluate,
        cameras={},
    )
    fit(task, device=device, report=report, resume_from=resume_from)
    return refiner


def load_refiner(path: Path, device: torch.device) -> Refiner:
    """A trained refiner."""
    checkpoint = load_checkpoint(path, "refiner", device)
    refiner = build_refiner(checkpoint.config).to(device)
    refiner.load_state_dict(checkpoint.model)
    return refiner.eval()

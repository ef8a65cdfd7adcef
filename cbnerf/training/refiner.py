"""Stage 2: train a refiner on pairs of stage-1 render and photograph."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from cbnerf.codebook.refiner import Refiner
from cbnerf.codebook.views import MadeOnDemand, Views
from cbnerf.config import Config, KnobError
from cbnerf.data.patches import PatchSampler
from cbnerf.data.references import ReferencePatchSampler, find_references, reference_view
from cbnerf.data.renders import Renders
from cbnerf.data.scene import Scene
from cbnerf.data.splits import split_views
from cbnerf.rng import Rng
from cbnerf.training.checkpoint import Checkpoint
from cbnerf.training.distributed import num_processes
from cbnerf.training.evaluation import mean_scores, refine_views, sr_views, unit_views
from cbnerf.training.loop import (
    Losses,
    Report,
    Task,
    deterministic_if_configured,
    fit,
    num_steps,
)
from cbnerf.training.models import build_refiner

Pairs = Sequence[tuple[Scene, Renders]]
Images = UInt8[Tensor, "views height width 3"]
References = UInt8[Tensor, "views references height width 3"] | None


@deterministic_if_configured
def train_refiner(
    config: Config,
    scene: Scene,
    renders: Renders,
    *,
    device: torch.device,
    report: Report,
    resume_from: Path | None = None,
    part: int = 1,
    joint: Pairs = (),
    sources: Pairs = (),
) -> Refiner:
    """Train on the training views' photographs and renders; score refined validation views.

    `joint` scenes share the refiner: it is trained on them as well, and scores are means over all.
    With `sources` it is trained on those scenes alone (`unseen-scene`, `low-res-only`), and the
    low-res photographs of the training views of `scene` constrain the result
    (`refiner.consistency`). With `part` the training stops after the first 1/`part` of its steps
    and can be resumed.

    Reports the losses as `train/...`, codebook health since the last report as `codebook/...` (of
    rank 0's patches), `val/psnr` (dB), `val/ssim`, and `val/gain` (dB), the change of PSNR against
    the stage-1 render.
    """
    _check_batch_size(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        refiner = build_refiner(config).to(device)
    if refiner.needs_references and (joint or sources):
        raise KnobError("refiner.kind = reference needs a high-res photograph of its scene")
    served = [(scene, renders), *joint]
    validation = _Validation(config, served)
    seen, target = _training_views(config, sources or served)
    views = _views(seen, target, device)
    is_consistent = bool(sources) and config.refiner.consistency > 0
    low_res = _low_res_views(config, scene, renders, device) if is_consistent else None

    def evaluate() -> dict[str, float]:
        return refiner.metrics() | validation.scores(refiner, device)

    scenes = trained_on(scene, joint, sources)
    steps = num_steps(config, "refiner", (one for one, _ in sources or served))
    first = _self_taught(low_res) if low_res and refiner.solves_unseen else views
    is_solved = first is not views or not any(p.requires_grad for p in refiner.parameters())
    if is_solved or resume_from is None:
        refiner.start_from(first)
        refiner.fit(views, low_res)
    if is_solved:
        metrics, solved = evaluate(), refiner.eval().state_dict()
        report(steps, metrics, Checkpoint(
            "refiner", scenes, steps, config, "float32", solved, {}, {}, metrics
        ))  # fmt: skip
        return refiner
    if refiner.needs_references:
        patches = _reference_patches(config, scene, renders, device)
    else:
        patches = _patches(config, refiner, seen, target, device)

    def losses(wrapped: nn.Module, batch_size: int, rng: Rng) -> Losses:
        parts = refiner.losses(wrapped, *patches.draw(batch_size, rng))
        return Losses(parts["train/loss"], parts)

    task = Task(
        stage="refiner",
        scene=scenes,
        config=config,
        precision="float32",
        optim=config.refiner.optim,
        steps=steps,
        model=refiner,
        param_groups=[{"params": list(refiner.parameters()), "lr": config.refiner.optim.lr}],
        losses=losses,
        evaluate=evaluate,
        cameras={},
    )
    fit(task, device=device, report=report, resume_from=resume_from, part=part)
    return refiner


def trained_on(scene: Scene, joint: Pairs, sources: Pairs) -> str:
    """The scenes that a refiner is trained on, in words that tell it from others."""
    names = ", ".join([scene.name, *(one.name for one, _ in joint)])
    return f"{names} from {', '.join(one.name for one, _ in sources)}" if sources else names


def _patches(
    config: Config, refiner: Refiner, seen: Renders, target: Images, device: torch.device
) -> PatchSampler:
    size = config.refiner.patch_size
    return PatchSampler(seen, target, size, device, turned=refiner.turns_patches)


def _reference_patches(
    config: Config, scene: Scene, renders: Renders, device: torch.device
) -> ReferencePatchSampler:
    view = reference_view(scene, config.data)
    return ReferencePatchSampler(renders.rgb[view], scene.images[view], config, device)


def _check_batch_size(config: Config) -> None:
    batch_size, world_size = config.refiner.optim.batch_size, num_processes()
    if config.refiner.alternates and world_size > 1 and batch_size // world_size % 2:
        raise KnobError(
            f"refiner.optim.batch_size = {batch_size} gives each of {world_size} processes an odd "
            "number of patches; make it even"
        )


class _Validation:
    """The validation views of all scenes that a refiner serves."""

    def __init__(self, config: Config, served: Pairs):
        self._scenes: list[tuple[Renders, Images, References]] = []
        for scene, renders in served:
            views = split_views(scene.num_views, config.data).val
            references = find_references(config, scene, renders, views)
            self._scenes.append((renders.of(views), scene.images[views], references))
        self._before = self._means(renders.rgb for renders, _, _ in self._scenes)

    def scores(self, refiner: Refiner, device: torch.device) -> dict[str, float]:
        """`val/psnr`, `val/ssim` and `val/gain`: means over scenes, each the mean over its views;
        empty without views."""
        scores = self._means(
            refine_views(refiner, renders, device, references)
            for renders, _, references in self._scenes
        )
        gain = {"val/gain": scores["val/psnr"] - self._before["val/psnr"]} if scores else {}
        return scores | gain

    def _means(self, images: Iterable[Images]) -> dict[str, float]:
        scores = [
            mean_scores(of_scene, target, "val")
            for of_scene, (_, target, _) in zip(images, self._scenes, strict=True)
        ]
        return {name: sum(s[name] for s in scores) / len(scores) for name in scores[0]}


def _training_views(config: Config, pairs: Pairs) -> tuple[Renders, Images]:
    """Renders and photographs of the training views of all scenes, cropped to their common size."""
    height = min(scene.height for scene, _ in pairs)
    width = min(scene.width for scene, _ in pairs)
    seen: list[Renders] = []
    target = []
    for scene, renders in pairs:
        views = split_views(scene.num_views, config.data).train
        own = renders.of(views)
        seen.append(Renders(*(part[:, :height, :width] for part in own)))
        target.append(scene.images[views, :height, :width])
    joined = Renders(*(torch.cat(parts) for parts in zip(*seen, strict=True)))
    return joined, torch.cat(target)


def _low_res_views(config: Config, scene: Scene, renders: Renders, device: torch.device) -> Views:
    """Renders and low-res photographs of the training views of a scene without high-res ones."""
    views = split_views(scene.num_views, config.data).train
    low_res = scene.low_res(config.data.low_res_kernel, views)
    return _views(renders.of(views), low_res, device)


def _self_taught(low_res: Views) -> Views:
    """Views of a scene without high-res photographs, whose renders stand for these."""
    renders = MadeOnDemand(lambda i: low_res.renders[i][:, :3], range(len(low_res.renders)))
    return low_res._replace(photographs=renders)


def _views(seen: Renders, target: UInt8[Tensor, "views _ _ 3"], device: torch.device) -> Views:
    return Views(sr_views(seen, device), unit_views(target, device))

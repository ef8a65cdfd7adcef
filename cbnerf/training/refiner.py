"""Stage 2: train a refiner on pairs of stage-1 render and photograph."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor, nn

from cbnerf.baselines.linear import LinearRefiner, fit_filter
from cbnerf.codebook.consistency import LowResView, fit_consistent_filter
from cbnerf.codebook.health import CodebookHealth
from cbnerf.codebook.refiner import Refiner, ResidualRefiner, refiner_losses
from cbnerf.codebook.views import MadeOnDemand
from cbnerf.config import Config, KnobError
from cbnerf.data.patches import PatchSampler
from cbnerf.data.references import ReferencePatchSampler, find_references, reference_view
from cbnerf.data.renders import Renders
from cbnerf.data.scene import Scene
from cbnerf.data.splits import split_views
from cbnerf.rng import Rng
from cbnerf.training.checkpoint import Checkpoint
from cbnerf.training.distributed import num_processes, process_rank
from cbnerf.training.evaluation import mean_scores, refine_views, unit_views
from cbnerf.training.loop import Losses, Report, Task, fit, heeding_determinism
from cbnerf.training.models import AnyRefiner, build_refiner

Pairs = Sequence[tuple[Scene, Renders]]
Images = UInt8[Tensor, "views height width 3"]
References = UInt8[Tensor, "views references height width 3"] | None
DrawLosses = Callable[[nn.Module, int, Rng], Losses]


@heeding_determinism
def train_refiner(
    config: Config,
    scene: Scene,
    renders: Renders,
    *,
    device: torch.device,
    report: Report,
    resume_from: Path | None = None,
    until: int | None = None,
    joint: Pairs = (),
    sources: Pairs = (),
) -> AnyRefiner:
    """Train on the training views' photographs and renders; score refined validation views.

    `joint` scenes share the refiner: it is trained on them as well, and scores are means over all.
    With `sources` it is trained on those scenes alone (`unseen-scene`, `low-res-only`): filters of
    the codes are weighted by cross-validation between source scenes, and the low-res photographs of
    the training views of `scene` constrain the result (`refiner.consistency`). With `until` the
    training stops after that many of its steps and can be resumed.

    Reports the losses as `train/...`, codebook health since the last report as `codebook/...` (of
    rank 0's patches), `val/psnr` (dB), `val/ssim`, and `val/gain` (dB), the change of PSNR against
    the stage-1 render.
    """
    world_size, batch_size = num_processes(), config.refiner.optim.batch_size
    if config.refiner.alternates and world_size > 1 and batch_size // world_size % 2:
        raise KnobError(
            f"refiner.optim.batch_size = {batch_size} gives each of {world_size} processes an odd "
            "number of patches; make it even"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        refiner = build_refiner(config).to(device)

    scenes, served = trained_on(scene, joint, sources), [(scene, renders), *joint]
    validation = _Validation(config, served)
    before = validation.scores(lambda rgb, references: rgb)

    health = None
    if isinstance(refiner, Refiner):
        health = CodebookHealth(refiner.autoencoder.quantizer.num_codes, device)

    seen, wanted, parts = _training_views(config, sources or served, by_scene=bool(sources))
    held_out = [part for part in sorted({*parts}) if part or len(sources) > 1]
    if isinstance(refiner, Refiner) and resume_from is None:
        refiner.start_from(unit_views(wanted, device))

    def fit_filters() -> dict[str, float]:
        """Solve what is not descended."""
        losses = {}
        if isinstance(refiner, ResidualRefiner):
            views = unit_views(seen, device), unit_views(wanted, device)
            refiner.fit_filters(*views, parts, held_out)
        elif isinstance(refiner, LinearRefiner):
            views = unit_views(seen, device), unit_views(wanted, device)
            pairs = ((render[0], photograph[0]) for render, photograph in zip(*views, strict=True))
            losses["train/loss"] = fit_filter(refiner, pairs)
        if sources and config.refiner.consistency:
            _agree_with_low_res(config, refiner, scene, renders, device)
        return losses

    def evaluate() -> dict[str, float]:
        solved = fit_filters()
        use = health.metrics() if health else {}
        if health:
            health.clear()
        scores = validation.scores(
            lambda rgb, references: refine_views(refiner, rgb, device, references)
        )
        gain = {"val/gain": scores["val/psnr"] - before["val/psnr"]} if scores else {}
        return solved | use | scores | gain

    if isinstance(refiner, LinearRefiner):
        metrics = evaluate()
        steps, found = config.refiner.optim.steps, refiner.eval().state_dict()
        whole = "refiner", scenes, steps, config, "float32", found, {}, {}, metrics
        report(steps, metrics, Checkpoint(*whole))
        return refiner
    if health is not None:
        patches = PatchSampler(seen, wanted, config.refiner.patch_size, device)
        losses = _code_losses(config, patches, health)
    elif sources or joint:
        raise KnobError("refiner.kind = reference needs a high-res photograph of its scene")
    else:
        losses = _reference_losses(config, scene, renders, device)

    task = Task(
        stage="refiner",
        scene=scenes,
        config=config,
        precision="float32",
        optim=config.refiner.optim,
        model=refiner,
        param_groups=[{"params": list(refiner.parameters()), "lr": config.refiner.optim.lr}],
        losses=losses,
        evaluate=evaluate,
        cameras={},
    )
    fit(task, device=device, report=report, resume_from=resume_from, until=until)
    if process_rank() != 0:
        fit_filters()  # rank 0 has evaluated
    return refiner


def trained_on(scene: Scene, joint: Pairs, sources: Pairs) -> str:
    """The scenes that a refiner is made of, in words that tell it from others."""
    names = ", ".join([scene.name, *(one.name for one, _ in joint)])
    return f"{names} from {', '.join(one.name for one, _ in sources)}" if sources else names


def _code_losses(config: Config, patches: PatchSampler, health: CodebookHealth) -> DrawLosses:
    """The paper's losses on patches of all training views."""

    def losses(wrapped: nn.Module, batch_size: int, rng: Rng) -> Losses:
        batch = patches.draw(batch_size, rng)
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

    return losses


def _reference_losses(
    config: Config, scene: Scene, renders: Renders, device: torch.device
) -> DrawLosses:
    """L1 in [-1, 1] on warped patches of the one view whose photograph NeRF-SR is given."""
    view = reference_view(scene, config.data)
    patches = ReferencePatchSampler(renders.rgb[view], scene.images[view], config, device)

    def losses(wrapped: nn.Module, batch_size: int, rng: Rng) -> Losses:
        batch = patches.draw(batch_size, rng)
        loss = 2 * F.l1_loss(wrapped(batch.sr, batch.references), batch.high_res)
        return Losses(loss, {"train/loss": loss})

    return losses


def _agree_with_low_res(
    config: Config, refiner: AnyRefiner, scene: Scene, renders: Renders, device: torch.device
) -> None:
    """Bring refined training views to what their low-res photographs show: by one filter, then by
    those of the codes."""
    if not isinstance(refiner, ResidualRefiner | LinearRefiner):
        return
    views = split_views(scene.num_views, config.data).train
    kernel = config.data.low_res_kernel
    low_res = scene.low_res(kernel, views)
    refined = refine_views(refiner, renders.rgb[views], device)
    seen, tried, known = (unit_views(x, device) for x in (renders.rgb[views], refined, low_res))
    triples = MadeOnDemand(
        lambda i: LowResView(seen[i][0], tried[i][0], known[i][0]), range(len(views))
    )
    refiner.add_filter(fit_consistent_filter(triples, config.refiner.consistency, kernel))
    if isinstance(refiner, ResidualRefiner):
        parts = _parts(len(views))
        refiner.back_project(seen, known, kernel, parts, sorted({*parts} - {0}))


def _parts(num_views: int) -> list[int]:
    """The part of each view of a scene: 1 for every fourth and 0 for the others."""
    return [int(view % 4 == 1) for view in range(num_views)]


class _Validation:
    """The validation views of all scenes that a refiner serves."""

    def __init__(self, config: Config, served: Pairs):
        self._parts: list[tuple[Images, Images, References]] = []
        for scene, renders in served:
            views = split_views(scene.num_views, config.data).val
            references = find_references(config, scene, renders, views)
            self._parts.append((renders.rgb[views], scene.images[views], references))

    def scores(self, refine: Callable[[Images, References], Images]) -> dict[str, float]:
        """Means over scenes, each the mean over its views; empty without views."""
        scores = [mean_scores(refine(rgb, r), target, "val") for rgb, target, r in self._parts]
        return {name: sum(s[name] for s in scores) / len(scores) for name in scores[0]}


def _training_views(
    config: Config, pairs: Pairs, by_scene: bool
) -> tuple[Images, Images, list[int]]:
    """Renders and photographs of the training views of all scenes, cut to their common size, and
    the part of each: its scene, or 1 for every fourth view of a scene and 0 for the others."""
    height = min(scene.height for scene, _ in pairs)
    width = min(scene.width for scene, _ in pairs)
    seen, wanted, parts = [], [], []
    for i, (scene, renders) in enumerate(pairs):
        views = split_views(scene.num_views, config.data).train
        seen.append(renders.rgb[views, :height, :width])
        wanted.append(scene.images[views, :height, :width])
        parts += [i] * len(views) if by_scene else _parts(len(views))
    return torch.cat(seen), torch.cat(wanted), parts

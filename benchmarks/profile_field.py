"""Where the time of a stage-1 training step goes, beside the floor of the hardware.

    python benchmarks/profile_field.py --resolution x2-252 --threads 1

Trains a field under torch's profiler and sums operators' own time by what they serve. The floor is
the time that the step's matrix products (FLOP, torch's counter) and its memory traffic (bytes that
operators read and write) would take at the peaks that this machine reaches in the same run: a
large matrix product, in bfloat16 where the networks multiply in it, and a large copy.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from provenance import provenance
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cbnerf.data.library import make_capture
from cbnerf.data.scene import make_scene
from cbnerf.nerf.model import multiplies_bfloat16
from cbnerf.overrides import with_overrides
from cbnerf.presets import preset
from cbnerf.training.distributed import choose_device
from cbnerf.training.field import train_field

PARTS = {
    "plane lookups": ("embedding_bag", "scatter_add"),
    "plane pyramid": ("lerp", "index_select"),
    "backward of the pyramid, on a GPU of the lookups, too": ("index_add",),
    "networks and sums along rays": ("aten::mm", "addmm", "threshold_backward", "clamp_min"),
    "sampling": ("searchsorted", "gather", "sort", "rand", "uniform_"),
    "optimiser": ("adam", "Adam"),
    "loss of total variation": ("mse_loss",),
}
"""Parts of a step by pieces of the names of their operators; what is left is element-wise."""


@dataclass(kw_only=True)
class Options:
    method: str = "cb-nerf"
    resolution: str = "x2-252"
    scene: str = "pebbles"
    """A built-in scene."""
    steps: int = 20
    threads: int = 1
    output: Path = Path("benchmarks/results/field")
    """Receives profile-cpu.md or profile-gpu.md."""


class ByteCounter(TorchDispatchMode):
    """Sums the sizes of what operators read and write; views move nothing."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [x for x in tree_leaves((args, kwargs, result)) if torch.is_tensor(x)]
            self.total += sum(tensor.nbytes for tensor in tensors)
        return result


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    device = choose_device()
    steps = {"field.optim.steps": options.steps, "field.optim.evaluations": 1}
    config = with_overrides(
        preset(options.method, options.resolution), {"data.validation": False} | steps
    )
    scene = make_scene(make_capture(options.scene, width=config.data.width), config.data)

    def train() -> None:
        train_field(config, scene, device=device, report=lambda *_: None)
        if device.type == "cuda":
            torch.cuda.synchronize()

    train()
    seconds = _seconds(train) / options.steps
    with profile() as recorded:
        train()
    with FlopCounterMode(display=False) as flops:
        train()
    with ByteCounter() as traffic:
        train()
    gflop = flops.get_total_flops() / options.steps / 1e9
    gigabytes = traffic.total / options.steps / 1e9
    dtype = torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    peak_flops = _peak_gflop_per_second(device, dtype)
    peak_bytes = _peak_gigabytes_per_second(device)
    floor = max(gflop / peak_flops, gigabytes / peak_bytes)
    lines = [
        f"# A training step of {options.method} at {options.resolution}, batch "
        f"{config.field.optim.batch_size}\n",
        provenance(options.threads),
        "| part | share of the operators' time |",
        "|---|---|",
        *(f"| {name} | {share:.0%} |" for name, share in _shares(recorded).items()),
        "\n| | a step | peak of this machine | time at the peak, of the step's |",
        "|---|---|---|---|",
        f"| matrix products | {gflop:.2f} GFLOP | {peak_flops:.0f} GFLOP/s "
        f"| {gflop / peak_flops / seconds:.0%} |",
        f"| memory traffic | {gigabytes:.2f} GB | {peak_bytes:.1f} GB/s "
        f"| {gigabytes / peak_bytes / seconds:.0%} |",
        f"\nA step takes {seconds / floor:.1f} times the larger of the two.",
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    (options.output / f"profile-{'gpu' if device.type == 'cuda' else 'cpu'}.md").write_text(
        text, encoding="utf-8"
    )
    print(text)


def _shares(recorded: profile) -> dict[str, float]:
    """Own time of operators by part, as shares of their sum."""
    times = dict.fromkeys([*PARTS, "element-wise and copies"], 0.0)
    for event in recorded.key_averages():
        own = event.self_device_time_total or event.self_cpu_time_total
        part = next(
            (part for part, pieces in PARTS.items() if any(p in event.key for p in pieces)),
            "element-wise and copies",
        )
        times[part] += own
    total = sum(times.values())
    return {part: spent / total for part, spent in times.items()}


def _peak_gflop_per_second(device: torch.device, dtype: torch.dtype, size: int = 4096) -> float:
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / _seconds(lambda: a @ a) / 1e9


def _peak_gigabytes_per_second(device: torch.device, size: int = 2**28) -> float:
    source = torch.zeros(size, device=device)
    target = torch.ones_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source)) / 1e9


def _seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """Best of some runs, after one that warms up."""
    run()
    best = float("inf")
    for _ in range(repeats):
        since = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - since)
    return best


if __name__ == "__main__":
    main(tyro.cli(Options))

"""The quantizer beside the full distance matrix with one-hot codes, and vector-quantize-pytorch.

    python benchmarks/quantizer.py

One forward and backward pass in training mode with codes that learn by gradient, float32. Each
cell is measured in a process of its own: first the peak memory of one pass over what was there
before it, then the median time of the passes that follow. Prints and writes times, memory, and
the ratios to cbnerf's quantizer. `-` stands for a pass that did not fit into `--memory`.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from provenance import provenance
from torch import Tensor, nn

from cbnerf.codebook.quantizer import VectorQuantizer, vq_loss
from cbnerf.config import CodebookConfig

METHODS = ("cbnerf", "one-hot", "vector-quantize-pytorch")
BETA = 0.25


@dataclass(kw_only=True)
class Options:
    latents: tuple[int, ...] = (8192, 32768, 131072)
    """Latents of one pass, N."""
    codes: tuple[int, ...] = (1024, 4096, 16384)
    """Codebook sizes, k."""
    dim: int = 64
    threads: int = 1
    memory: float = 12.0
    """GiB that a process may take on a CPU."""
    repeats: int = 3
    """Timed passes of each cell."""
    output: Path = Path("benchmarks/results/quantizer")
    """Receives cpu.json and cpu.md, or gpu.json and gpu.md."""
    cell: str = ""
    """METHOD,N,k: measure only this and print it as JSON; the benchmark calls itself so."""


@dataclass(frozen=True)
class Cell:
    method: str
    latents: int
    codes: int
    seconds: float | None
    mebibytes: float | None


class OneHotQuantizer(nn.Module):
    """All N x k distances, their argmin as N x k one-hot rows, and a product that picks codes."""

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(size, dim))

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.codebook
        distances = (
            latents.square().sum(1, keepdim=True)
            + codes.square().sum(1)
            - 2 * torch.matmul(latents, codes.T)
        )
        indices = distances.argmin(1, keepdim=True)
        one_hot = torch.zeros(len(latents), len(codes), device=latents.device)
        nearest = torch.matmul(one_hot.scatter_(1, indices, 1), codes)
        commitment = F.mse_loss(latents, nearest.detach())
        loss = F.mse_loss(nearest, latents.detach()) + BETA * commitment
        return latents + (nearest - latents).detach(), loss


def build(method: str, size: int, dim: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """From latents to straight-through codes and their loss."""
    device = _device()
    if method == "one-hot":
        return OneHotQuantizer(size, dim).to(device)
    if method == "cbnerf":
        config = CodebookConfig(size=size, dim=dim, beta=BETA)
        ours = VectorQuantizer(config).to(device)

        def quantize(latents: Tensor) -> tuple[Tensor, Tensor]:
            found = ours(latents)
            return found.latents, vq_loss(found, config)

        return quantize
    from vector_quantize_pytorch import VectorQuantize

    theirs = VectorQuantize(
        dim=dim, codebook_size=size, learnable_codebook=True, ema_update=False,
        rotation_trick=False, commitment_weight=BETA,
    ).to(device)  # fmt: skip

    def quantize_theirs(latents: Tensor) -> tuple[Tensor, Tensor]:
        codes, _, loss = theirs(latents[None])
        return codes[0], loss.sum()

    return quantize_theirs


def measure(method: str, num_latents: int, size: int, options: Options) -> Cell:
    """In this process: memory of the first pass, then times."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    latents = torch.randn(num_latents, options.dim, device=_device(), requires_grad=True)
    upstream = torch.randn_like(latents)
    quantize = build(method, size, options.dim)

    def run(latents: Tensor, upstream: Tensor) -> float:
        started = time.perf_counter()
        codes, loss = quantize(latents)
        torch.autograd.backward([codes, loss], [upstream, torch.ones_like(loss)])
        if latents.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    few = latents[:16].detach().requires_grad_()
    run(few, upstream[:16])  # loads kernels, makes the memory of the codebook's gradient
    before = _reset_peak()
    run(latents, upstream)
    memory = (_peak() - before) / 2**20
    seconds = statistics.median(run(latents, upstream) for _ in range(options.repeats))
    return Cell(method, num_latents, size, seconds, memory)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _reset_peak() -> int:
    """Bytes in use now; the peak counts from here."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _resident("VmRSS")


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident("VmHWM")


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith(name))


def measure_apart(method: str, num_latents: int, size: int, options: Options) -> Cell:
    """The same in a process of its own; without figures if its memory does not suffice."""
    command = [
        sys.executable, __file__, f"--cell={method},{num_latents},{size}", f"--dim={options.dim}",
        f"--threads={options.threads}", f"--repeats={options.repeats}",
        f"--memory={options.memory}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Cell(**json.loads(done.stdout))
    if "allocate memory" in done.stderr or "out of memory" in done.stderr:
        return Cell(method, num_latents, size, None, None)
    raise RuntimeError(f"{method}, N = {num_latents}, k = {size}:\n{done.stderr}")


def main(options: Options) -> None:
    if options.cell:
        method, num_latents, size = options.cell.split(",")
        if not torch.cuda.is_available():
            limit = int(options.memory * 2**30)
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        print(json.dumps(asdict(measure(method, int(num_latents), int(size), options))))
        return
    about = (
        provenance(options.threads)
        + f"\nD = {options.dim}, median of {options.repeats}, load {os.getloadavg()[0]:.1f} at the "
        "start\n"
    )
    cells: list[Cell] = []
    for num_latents in options.latents:
        for size in options.codes:
            for method in METHODS:
                cells.append(measure_apart(method, num_latents, size, options))
                print(cells[-1], flush=True)
            _write(options.output, about, cells)
    print((options.output / f"{_name()}.md").read_text(encoding="utf-8"))


def _name() -> str:
    return "gpu" if torch.cuda.is_available() else "cpu"


def _write(output: Path, about: str, cells: list[Cell]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    ours = {(cell.latents, cell.codes): cell for cell in cells if cell.method == "cbnerf"}
    lines = [
        "# Nearest codes: time and peak memory of one training pass\n",
        about,
        "| N | k | method | ms | MiB | time / cbnerf's | memory / cbnerf's |",
        "|---:|---:|---|---:|---:|---:|---:|",
    ]
    for cell in cells:
        base = ours[cell.latents, cell.codes]
        cells_of_row = [
            cell.latents, cell.codes, cell.method,
            _number(cell.seconds, 1e-3), _number(cell.mebibytes, 1),
            _ratio(cell.seconds, base.seconds), _ratio(cell.mebibytes, base.mebibytes),
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells_of_row)) + " |")
    file = output / _name()
    file.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plain = {"provenance": about, "cells": [asdict(cell) for cell in cells]}
    file.with_suffix(".json").write_text(json.dumps(plain, indent=1), encoding="utf-8")


def _number(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:.0f}"


def _ratio(value: float | None, base: float | None) -> str:
    return "-" if value is None or base is None else f"{value / base:.1f}x"


if __name__ == "__main__":
    main(tyro.cli(Options))

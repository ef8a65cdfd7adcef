"""Record what a search would see: configurations x scenes x rungs x seeds, trained for real.

    python benchmarks/search_table.py

Random configurations of the space of `tune_configs/codebook.yaml` (the first is the preset) on the
eight built-in scenes. `search.py` replays searches on what they predict. A stopped recording goes
on.
"""

import gzip
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
import tyro
from provenance import provenance
from recorded import SPACE, TABLE, plan_of

from cbnerf.config import Config
from cbnerf.data.library import load_scene
from cbnerf.data.renders import load_renders
from cbnerf.overrides import with_overrides
from cbnerf.scenes import BUILT_IN_SCENES
from cbnerf.search.plan import Plan
from cbnerf.search.sampler import suggest
from cbnerf.search.spec import load_spec
from cbnerf.training.stages import RENDERS_FILE, run_field, run_refiner

CPU = torch.device("cpu")


@dataclass(kw_only=True)
class Options:
    configurations: int = 48
    seeds: int = 2
    storage: Path = Path("runs/search_table")
    """Holds scenes, fields, refiners and the rows recorded so far."""
    output: Path = TABLE


def main(options: Options) -> None:
    torch.set_num_threads(1)
    plan = plan_of(load_spec(SPACE))
    base = plan.base
    configurations = list(_draw(plan, options.configurations))
    rows_file = options.storage / "rows.jsonl"
    options.storage.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = (
        [json.loads(line) for line in rows_file.open(encoding="utf-8")]
        if rows_file.exists()
        else []
    )
    done = {(row["configuration"], row["scene"], row["seed"]) for row in rows}
    fields = {scene: _field(base, scene, options.storage) for scene in BUILT_IN_SCENES}
    with rows_file.open("a", encoding="utf-8") as file:
        for number, overrides in enumerate(configurations):
            for seed in range(options.seeds):
                for scene in BUILT_IN_SCENES:
                    if (number, scene, seed) in done:
                        continue
                    config = with_overrides(base, overrides | {"seed": seed})
                    row = {"configuration": number, "scene": scene, "seed": seed}
                    row["rungs"] = _climb(config, scene, options.storage, (9, 3, 1))
                    if seed == 0 and scene == BUILT_IN_SCENES[number % len(BUILT_IN_SCENES)]:
                        # One scene tells what it costs to stop at rungs.
                        (whole,) = _climb(config, scene, options.storage, (1,))
                        row["straight"] = whole["seconds"]
                    rows.append(row)
                    file.write(json.dumps(row) + "\n")
                    file.flush()
            print(f"configuration {number}", flush=True)
    table = {
        "about": provenance(1),
        "configurations": configurations,
        "fields": fields,
        "rows": [row for row in rows if row["configuration"] < len(configurations)],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_bytes(gzip.compress(json.dumps(table).encode(), mtime=0))


def _draw(plan: Plan, count: int) -> Iterator[dict[str, Any]]:
    """The preset, then random points of the space."""
    yield {}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(count - 1):
        yield suggest(study.ask(), plan)


def _field(base: Config, name: str, storage: Path) -> dict[str, float]:
    scene = load_scene(name, None, storage, base.data)
    return run_field(base, scene, storage / "fields" / name, device=CPU)


def _climb(
    config: Config, name: str, storage: Path, parts: tuple[int, ...]
) -> list[dict[str, float]]:
    """Metrics at each rung, a part of the steps, with the CPU seconds from the rung below."""
    scene = load_scene(name, None, storage, config.data)
    renders = load_renders(storage / "fields" / name / RENDERS_FILE)
    folder = storage / "refiner"
    rungs = []
    for part in parts:
        started = time.process_time()
        metrics = run_refiner(config, scene, renders, folder, device=CPU, part=part)
        kept = {k: round(v, 5) for k, v in metrics.items() if k.startswith("val/")}
        rungs.append(kept | {"seconds": round(time.process_time() - started, 2)})
    for file in folder.iterdir():
        file.unlink()
    return rungs


if __name__ == "__main__":
    main(tyro.cli(Options))

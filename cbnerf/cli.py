"""The command line of the core: `cbnerf import`, `train-field`, `train-refiner`, `evaluate`,
`inspect`, `compare`, `render`, `cache`, `report`, `enqueue`, `suggest`, `make-scenes`. Works
without ray, optuna and mlflow.
"""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from cbnerf.commands.photographs import Import
from cbnerf.commands.scene import Evaluate, Inspect, MakeScenes, Render, TrainField, TrainRefiner
from cbnerf.commands.storage import Cache, Compare, Report
from cbnerf.commands.study import Enqueue, Suggest
from cbnerf.config import KnobError
from cbnerf.console import expand_homes, explain_unforeseen, fail, prepare_output
from cbnerf.data.library import default_storage
from cbnerf.presets import DEFAULT_METHOD, DEFAULT_RESOLUTION, choose_resolution, preset
from cbnerf.progress import show_progress
from cbnerf.training.distributed import choose_device, is_launched
from cbnerf.training.preemption import Preempted, leaving_at_sigterm

Untrained = (
    Import | Evaluate | Inspect | Compare | Render | Cache | Report | Enqueue | Suggest | MakeScenes
)
Command = TrainField | TrainRefiner | Untrained


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line. Bad input prints one line and exits with status 2; an unforeseen error
    prints one line that names a file with the traceback, and exits with status 1. At SIGTERM a
    training writes a checkpoint of its last step."""
    arguments = sys.argv[1:] if arguments is None else arguments
    storage = default_storage()
    prepare_output()
    try:
        command = parse_command(arguments)
        expand_homes(command)
        if os.environ.get("RANK", "0") == "0":  # of torchrun
            show_progress()
        storage = getattr(command, "storage", storage)
        if is_launched() and not isinstance(command, TrainField | TrainRefiner):
            raise ValueError("torchrun is for train-field and train-refiner; start this without it")
        with leaving_at_sigterm():
            command.run()
    except Preempted:
        fail(
            "cbnerf",
            "ended by SIGTERM; run the same command again to resume from its checkpoint",
            Preempted.status,
        )
    except KeyboardInterrupt:
        fail("cbnerf", "interrupted; run the same command again to resume from its checkpoint", 130)
    except (ValueError, OSError, FloatingPointError) as error:
        fail("cbnerf", error, 2)
    except Exception as error:
        fail("cbnerf", explain_unforeseen(error, storage), 1)


def parse_command(arguments: Sequence[str]) -> Command:
    """The command with its options; `--preset` and `--resolution` set the defaults of its knobs."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=DEFAULT_METHOD)
    first.add_argument("--resolution", default=DEFAULT_RESOLUTION)
    chosen, _ = first.parse_known_args(arguments)
    has_gpu = choose_device().type == "cuda"
    config = preset(chosen.preset, choose_resolution(chosen.resolution, has_gpu=has_gpu))
    field = TrainField(scene="", output=Path(), config=config)
    refiner = TrainRefiner(scene=(), field=(), output=Path(), config=config)
    for command in (field, refiner):
        for flag in {"scene", "field", "output"} & vars(command).keys():
            setattr(command, flag, tyro.MISSING)  # required
    commands = (
        Annotated[TrainField, tyro.conf.subcommand(default=field)]
        | Annotated[TrainRefiner, tyro.conf.subcommand(default=refiner)]
        | Untrained
    )
    boxed = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxed):
            return tyro.cli(
                commands,
                prog="cbnerf",
                description="Train, score and render Codebook-NeRF on one scene.",
                args=arguments,
            )
    except SystemExit as stop:
        # tyro draws a box around the one-line message of a check in config.py.
        cause: BaseException | None = stop
        while cause is not None and not isinstance(cause, KnobError):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        print(boxed.getvalue(), end="", file=sys.stderr)
        raise

"""`python tune.py`: from a command line to a finished study."""

import logging
import os
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import ray
import tyro
from filelock import FileLock, Timeout
from mlflow.exceptions import MlflowException
from ray.exceptions import RayError
from ray.tune import TuneError

from cbnerf.console import expand_homes, explain_unforeseen, fail, one_line, prepare_output
from cbnerf.data.library import DATA_VARIABLE, DEFAULT_DATA, describe_photographs
from cbnerf.files import check_may_write, is_about_space
from cbnerf.overrides import with_overrides
from cbnerf.report.tables import to_markdown
from cbnerf.search.driver import Outcome, find_precision, quieten_libraries, run_study
from cbnerf.search.estimate import bytes_needed, describe_price
from cbnerf.search.machines import num_slots
from cbnerf.search.mlflow_store import runs_page, tracking_uri, without_password
from cbnerf.search.peaks import describe_memory
from cbnerf.search.plan import Plan
from cbnerf.search.report import known_scores, scene_table, write_report
from cbnerf.search.request import (
    Options,
    Settled,
    fingerprint_photographs,
    plan_study,
    read_request,
    settle,
)  # fmt: skip
from cbnerf.search.state import StudyState
from cbnerf.search.tracking import NOT_COMPARABLE

_PROGRAM, _INTERRUPTED = "tune.py", 130


def main(default_config: Path) -> None:
    """Run a command line. Bad input prints one line and exits with status 2; an unforeseen error
    prints one line that names a file with the traceback, and exits with status 1."""
    prepare_output()
    options = tyro.cli(Options)
    quieten_libraries()
    try:
        expand_homes(options)
        _run(options, default_config)
    except KeyboardInterrupt:
        fail(_PROGRAM, "interrupted; run the same command again to resume", _INTERRUPTED)
    except Exception as error:
        fail(_PROGRAM, *_explain(error, options.storage))


def _explain(error: Exception, storage: Path) -> tuple[str, int]:
    """A message of one line and the exit status."""
    if is_about_space(error):
        cause = one_line(error)
        return f"the disk is full ({cause}); make room and run the same command again to resume", 2
    match error:
        case RayError() | TuneError():
            # A task's error is also an instance of its cause's class; the cause is more readable.
            cause = one_line(getattr(error, "cause", None) or error)
            return explain_unforeseen(error, storage, cause), 1
        case MlflowException():
            cause = one_line(f"MLflow: {error.message}")
            return explain_unforeseen(error, storage, cause), 1
        case ValueError() | OSError():
            return str(error), 2
        case _:
            return explain_unforeseen(error, storage), 1


def _run(options: Options, default_config: Path) -> None:
    if options.concurrency is not None and options.concurrency < 1:
        raise ValueError("--concurrency must be at least 1")
    if options.confirm < 0:
        raise ValueError("--confirm must be at least 0")
    # A mistake ends the command before Ray starts.
    checked = settle(read_request(options, default_config), options, has_gpu=None)
    request = checked.request
    if not options.dry_run:
        check_may_write(checked.plan.storage)
        request = replace(request, photographs=fingerprint_photographs(checked))
    with _ray(options.address):
        has_gpu = ray.cluster_resources().get("GPU", 0) > 0
        settled = settle(request, options, has_gpu=has_gpu)
        _describe(settled.plan, settled.views)
        if options.dry_run:
            print("\n".join(describe_price(settled.plan) + describe_memory(settled.plan)))
            return
        plan, outcome = _search(settled, options)
    if outcome is None:
        raise ValueError(
            f"study {plan.name}: no configuration was trained to its end; all failed (see their "
            "runs in MLflow), are as large as one that failed for memory, or lie beyond `limits`"
        )
    _print_outcome(plan, outcome)


def _search(settled: Settled, options: Options) -> tuple[Plan, Outcome | None]:
    request, plan, views, before = settled
    _check_room(plan, options.address)
    concurrency = options.concurrency
    if concurrency is None and options.address is None:
        concurrency = num_slots(plan)
    with _locked(plan):
        if before is None:
            plan.check_disk(needed=bytes_needed(plan, views))
        plan = plan.with_precision(precision := find_precision(plan))
        print(f"precision  {precision} in stage 1", flush=True)
        replace(request, resolution=plan.resolution, precision=precision).write(plan.folder)
        return plan, run_study(plan, print, concurrency, options.confirm)


def _print_outcome(plan: Plan, outcome: Outcome) -> None:
    print(f"\n{to_markdown(scene_table(outcome.scores))}\n")
    if plan.data is None:
        print(f"{NOT_COMPARABLE}.")
    phases = ", ".join(f"{phase} {spent:.0f} s" for phase, spent in outcome.seconds.items())
    print(f"time       {phases}")
    print(f"best       configuration {outcome.best}, {_quoted(plan.folder / 'best.yaml')}")
    print(f"lead       {outcome.standing}")
    print(f"report     {_quoted(plan.folder / 'report.html')}")
    if outcome.model is not None:
        print(f"model      {outcome.model}")
    uri = tracking_uri(plan.storage)
    page = runs_page(outcome.experiment_id, plan.spec.objectives[0])
    if uri.startswith("http"):
        print(f"compare    {without_password(uri)}/{page}")
    else:
        print(f"compare    mlflow ui --backend-store-uri {_quoted(uri)}")
        print(f"           and open http://127.0.0.1:5000/{page}")


def _quoted(word: object) -> str:
    """A path or name, quoted for a shell."""
    return shlex.quote(str(word))


def report_study(storage: Path, name: str, *, reload_every: int | None = None) -> Path:
    """Write the report of a study, finished or running; returns the path of its page, which a
    browser reloads every `reload_every` seconds.

    Needs neither the photographs nor the machines of the study. Raises ValueError and writes
    nothing if no configuration has finished.
    """
    quieten_libraries()
    plan = plan_study(storage, name)
    state = StudyState(plan, adopt=False)
    best = state.best()
    if best is None:
        raise ValueError(f"study {name}: no configuration has finished yet")
    config, scores = with_overrides(plan.base, best.params), known_scores(state, best.number)
    *_, page = write_report(state, config, best.number, scores, reload_every=reload_every)
    return page


def watch_study(storage: Path, name: str, every: int, say: Callable[[str], None]) -> Path:
    """Write the report of a study every few seconds while a process runs it, and a last time when
    it has ended or at Ctrl-C; returns the path of the page.

    `say` prints where the page is, or what it waits for. Raises ValueError as `report_study`.
    """
    printed = ""
    with suppress(KeyboardInterrupt):
        while _is_running(plan_study(storage, name)):
            try:
                page = report_study(storage, name, reload_every=every)
                about = f"{page} is written every {every} s; Ctrl-C ends that, not the study"
            except ValueError as error:  # It has not got far enough.
                about = f"{error}; waiting"
            if about != printed:
                say(about)
                printed = about
            time.sleep(every)
    return report_study(storage, name)


def _is_running(plan: Plan) -> bool:
    """Whether a process searches this study now."""
    try:
        with FileLock(plan.lock_file, timeout=0):
            return False
    except Timeout:
        return True


def _describe(plan: Plan, views: dict[str, int]) -> None:
    spec, data = plan.spec, plan.base.data
    print(f"study      {plan.name}")
    if plan.data is None:
        print(
            f"data       built-in scenes, since there is no LLFF data under {DEFAULT_DATA}, --data "
            f"or ${DATA_VARIABLE}; results are not comparable with the paper"
        )
    else:
        print(f"data       {plan.source}")
    print(f"scenes     {', '.join(f'{scene} ({count})' for scene, count in views.items())}")
    if plan.data is not None:
        print(f"read from  {describe_photographs(plan.scenes, plan.data, data.width)}")
    print(
        f"method     {plan.method} at {plan.resolution}, images {data.width} wide from "
        f"{data.width // data.scale} wide"
    )
    print(
        f"search     {spec.trials} configurations x {len(plan.scenes)} scenes "
        f"{'together ' if plan.base.codebook.shared else ''}over {', '.join(spec.space)}"
    )
    print(f"objective  {', '.join(spec.objectives)}; stopping by {spec.stopping.rule}"
          f"{f' at {plan.rungs} rungs' if plan.rungs > 1 else ''}")  # fmt: skip
    if plan.shares_fields:
        print(f"stage 1    {len(plan.scenes)} fields, each trained once")
    elif plan.stage == "field":
        print("stage 1    is what is searched")
    else:
        print("stage 1    trained for each of its configurations and scenes")
    resources = ray.cluster_resources()
    print(
        f"machine    {resources.get('CPU', 0):.0f} CPUs, {resources.get('GPU', 0):.0f} GPUs: "
        f"{num_slots(plan)} training runs at a time"
    )
    if num_slots(plan) == 0:
        print("           (none fits now; waiting for machines to join)")
    sys.stdout.flush()


def _check_room(plan: Plan, address: str | None) -> None:
    """ValueError for a training run that does not fit on a local Ray, which no machine joins."""
    if address is None and num_slots(plan) == 0:
        spec, has = plan.spec.resources, ray.cluster_resources()
        raise ValueError(
            f"a training run needs {spec.min_workers * spec.cpus_per_worker:g} "
            f"CPUs and {spec.min_workers * plan.gpus_per_worker:g} GPUs, this machine has "
            f"{has.get('CPU', 0):.0f} and {has.get('GPU', 0):.0f}; lower `resources`, or give "
            "--address of a cluster"
        )


@contextmanager
def _ray(address: str | None) -> Iterator[None]:
    """A local Ray for the length of the study, or the cluster at `address`."""
    # Without it a training run that asks for no GPU sees, and takes, all of them.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    if address is None and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        # A local Ray has a token of its own. Ray itself would keep one in the home folder, which
        # a container may not write.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        ray.init(
            address=address or "local",
            # A local Ray ends with the study, and its dashboard is as slow to start as a worker.
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:
        if address is not None:  # None there, or one of another version
            raise ValueError(f"--address {address}: {one_line(error)}") from None
        raise RuntimeError(f"Ray did not start on this machine: {one_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _locked(plan: Plan) -> Iterator[None]:
    """Hold the lock of a study; ValueError if another process searches it."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(plan.lock_file, timeout=1):
            yield
    except Timeout:
        raise ValueError(
            f"study {plan.name} is under way in another process; `cbnerf report "
            f"{_quoted(plan.name)}` shows how far it is, another --name starts another one"
        ) from None

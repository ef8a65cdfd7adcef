"""`python tune.py`: from a command line to a finished study."""

import logging
import os
import secrets
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import tyro
import yaml
from filelock import FileLock, Timeout
from mlflow.exceptions import MlflowException
from ray.exceptions import RayError
from ray.tune import TuneError

from cbnerf.console import expand_homes, explain_unforeseen, fail, one_line, prepare_output
from cbnerf.data.library import (
    DATA_VARIABLE,
    DEFAULT_DATA,
    check_scenes,
    default_storage,
    describe_photographs,
)
from cbnerf.data.llff import fingerprint
from cbnerf.files import atomic_write_text, check_may_write, is_about_space
from cbnerf.overrides import with_overrides
from cbnerf.report.tables import to_markdown
from cbnerf.search.driver import (
    find_precision,
    known_scores,
    quieten_libraries,
    run_study,
)
from cbnerf.search.estimate import calibrate
from cbnerf.search.machines import num_slots
from cbnerf.search.mlflow_store import tracking_uri, without_password
from cbnerf.search.plan import Plan, make_plan
from cbnerf.search.report import scene_table, write_report
from cbnerf.search.spec import parse_spec
from cbnerf.search.state import StudyState
from cbnerf.search.tracking import NOT_COMPARABLE
from cbnerf.strict_yaml import load_yaml
from cbnerf.training.distributed import choose_device
from cbnerf.training.models import count_parameters

_REQUEST_FILE = "request.yaml"
_PROGRAM, _INTERRUPTED = "tune.py", 130
_FIELD_BYTES = 400
"""Of a checkpoint of the planes field, for each pixel of an image."""
_CHARTS = "compareRunsMode=CHART&workflowType=machine_learning"
"""MLflow's UI opens on its pages for language models unless told otherwise."""


@dataclass(kw_only=True)
class Options:
    """Search hyper-parameters of Codebook-NeRF over several scenes with Ray, Optuna and MLflow."""

    scenes: str = "all"
    """`all`, or names of scenes separated by commas; one that holds a comma in double quotes."""
    config: Path | None = None
    """Search specification; `tune_configs/default.yaml` if not given."""
    data: Path | None = None
    """Folder of LLFF scene folders; else $CBNERF_DATA, else data/nerf_llff_data, else `data` in
    the storage named by $CBNERF_STORAGE, else the built-in scenes."""
    trials: int | None = None
    """Configurations to try; a finished study goes on when this grows."""
    resolution: str | None = None
    """Image size, overriding the specification."""
    method: str | None = None
    """Method, overriding the specification."""
    name: str | None = None
    """Name of the study, from method, resolution and scenes if not given."""
    resume: bool = False
    """Go on with the study `--name` as it was started, without repeating its other options. (The
    same command as before goes on without this flag, too.)"""
    storage: Path = field(default_factory=default_storage)
    """Folder for studies, cache and MLflow, $CBNERF_STORAGE or runs if not given; on a cluster one
    that all machines share."""
    concurrency: int | None = None
    """Training runs at a time; as many as the machines hold if not given, and on a cluster as many
    again wait for machines to join. With 1 the same seed gives the same trials and values on a
    CPU, bit for bit."""
    cache: str | None = None
    """URI of a store that trained stages are shared through beyond `--storage`, such as
    s3://bucket/cache."""
    gpus: float | None = None
    """GPUs of each process of a training run, overriding the specification; may be a part of one.
    Needed where machines with GPUs only join once trainings wait for them."""
    address: str | None = None
    """Ray cluster to run on, such as `auto`; a local Ray is started if not given."""
    dry_run: bool = False
    """Print the plan and what it will cost, and stop."""


def main(default_config: Path) -> None:
    """Run a command line; bad input ends in one line and exit status 2, anything that nobody
    foresaw in one that names the file of its traceback, and exit status 1."""
    prepare_output()
    options = tyro.cli(Options)
    quieten_libraries()
    try:
        expand_homes(options)
        _run(options, default_config)
    except KeyboardInterrupt:
        fail(_PROGRAM, "interrupted; the same command goes on where it stopped", _INTERRUPTED)
    except Exception as error:
        fail(_PROGRAM, *_explain(error, options.storage))


def _explain(error: Exception, storage: Path) -> tuple[str, int]:
    """One line for people and the exit status."""
    if is_about_space(error):
        return f"the disk is full ({one_line(error)}); make room, and the same command goes on", 2
    match error:
        case RayError() | TuneError():
            # A task's error is an instance of its cause's class, too; the cause is for people.
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
    request = _load_request(options) if options.resume else _make_request(options, default_config)
    if options.trials is not None:
        request["spec"]["trials"] = options.trials
    if options.gpus is not None:
        request["spec"]["resources"] = request["spec"].get("resources", {}) | {
            "gpus_per_worker": options.gpus
        }
    if options.concurrency is not None and options.concurrency < 1:
        raise ValueError("--concurrency must be at least 1")
    plan, _ = _settle(request, options, has_gpu=False)  # Mistakes come out before Ray starts.
    if not options.dry_run:
        check_may_write(plan.storage)
        request["photographs"] = _know_photographs(plan)
    with _ray(options.address):
        has_gpu = ray.cluster_resources().get("GPU", 0) > 0
        plan, views = _settle(request, options, has_gpu=has_gpu)
        _describe(plan, views)
        if options.dry_run:
            _price(plan)
            return
        _check_room(plan, options.address)
        concurrency = options.concurrency
        if concurrency is None and options.address is None:
            concurrency = num_slots(plan)
        with _alone(plan):
            _check_same_resolution(plan)
            if not (plan.folder / _REQUEST_FILE).exists():
                plan.check_disk(needed=_bytes_needed(plan, views))
            plan = plan.with_precision(find_precision(plan))
            print(f"precision  {plan.base.field.precision} in stage 1", flush=True)
            settled = request | {"resolution": plan.resolution,
                                 "precision": plan.base.field.precision}  # fmt: skip
            atomic_write_text(plan.folder / _REQUEST_FILE, yaml.safe_dump(settled, sort_keys=False))
            outcome = run_study(plan, print, concurrency)
    if outcome is None:
        raise ValueError(
            f"study {plan.name}: no configuration was trained to its end; all failed (see their "
            "runs in MLflow) or lie beyond `limits`"
        )
    print(f"\n{to_markdown(scene_table(outcome.scores))}\n")
    if plan.data is None:
        print(f"{NOT_COMPARABLE}.")
    phases = ", ".join(f"{phase} {spent:.0f} s" for phase, spent in outcome.seconds.items())
    print(f"time       {phases}")
    print(f"best       configuration {outcome.best}, {_pasted(plan.folder / 'best.yaml')}")
    print(f"report     {_pasted(plan.folder / 'report.html')}")
    uri = tracking_uri(plan.storage)
    page = f"#/experiments/{outcome.experiment_id}/runs?{_CHARTS}"
    if uri.startswith("http"):
        print(f"compare    {without_password(uri)}/{page}")
    else:
        print(f"compare    mlflow ui --backend-store-uri {_pasted(uri)}")
        print(f"           and open http://127.0.0.1:5000/{page}")


def _pasted(word: object) -> str:
    """A path or name as it can be pasted into a shell."""
    return shlex.quote(str(word))


def report_study(storage: Path, name: str) -> Path:
    """Write the report of a study that has a finished configuration, running or not; its page.

    Neither its photographs nor its machines are asked for. Where nothing has finished nothing is
    written.
    """
    quieten_libraries()
    options = Options(storage=storage, name=name, resume=True)
    plan = _with_same_precision(_plan(_load_request(options), options, has_gpu=False))
    state = StudyState(plan, adopt=False)
    best = state.best()
    if best is None:
        raise ValueError(f"study {name}: no configuration has finished yet")
    config = with_overrides(plan.base, best.params)
    *_, page = write_report(state, config, best.number, known_scores(state, best.number))
    return page


def _make_request(options: Options, default_config: Path) -> dict[str, Any]:
    """All that decides what a study computes, as plain values."""
    file = options.config or default_config
    content = load_yaml(file)
    overrides = {"resolution": options.resolution, "method": options.method}
    content |= {name: value for name, value in overrides.items() if value is not None}
    try:
        parse_spec(content)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    data = str(options.data.resolve()) if options.data else None
    return {"scenes": options.scenes, "data": data, "spec": content}


def _load_request(options: Options) -> dict[str, Any]:
    fixed = ("config", "resolution", "method")
    repeated = [name for name in fixed if getattr(options, name) is not None]
    repeated += ["scenes"] if options.scenes != "all" else []
    if repeated:
        raise ValueError(f"--resume goes on as the study was started; leave out --{repeated[0]}")
    studies = options.storage / "studies"
    known = sorted(file.parent.name for file in studies.glob(f"*/{_REQUEST_FILE}"))
    if options.name is None:
        raise ValueError("--resume: give the study's --name")
    if options.name not in known:
        raise ValueError(
            f"no study {options.name!r} in {studies}; "
            + (f"there are {', '.join(known)}" if known else "it holds none")
        )
    request = load_yaml(studies / options.name / _REQUEST_FILE)
    if options.data and not request["data"]:
        raise ValueError(f"--data: study {options.name} was started on built-in scenes")
    return request | ({"data": str(options.data.resolve())} if options.data else {})


def _plan(request: dict[str, Any], options: Options, *, has_gpu: bool) -> Plan:
    """The plan of a request; of a study that goes on its scenes are not looked for."""
    content = request["spec"]
    if "resolution" in request:  # of a study that goes on, perhaps on other machines
        content = content | {"resolution": request["resolution"]}
    names = request.get("scene_names")  # more may have come since
    return make_plan(
        parse_spec(content),
        scenes=tuple(names) if names and options.resume else request["scenes"],
        data=Path(request["data"]) if request["data"] else None,
        name=options.name,
        storage=options.storage,
        has_gpu=has_gpu,
        cache_store=options.cache,
    )


def _settle(
    request: dict[str, Any], options: Options, *, has_gpu: bool
) -> tuple[Plan, dict[str, int]]:
    """The plan and the number of views of its scenes, everything checked but the pixels."""
    plan = _plan(request, options, has_gpu=has_gpu)
    _check_names(plan)
    if options.resume:
        _check_still_there(plan)
    request["data"] = str(plan.data) if plan.data else None
    request["scene_names"] = list(plan.scenes)
    _check_same_request(plan, request)
    return _with_same_precision(plan), _count_views(plan)


def _check_names(plan: Plan) -> None:
    """What cannot be written into a report or MLflow is refused before anything is trained."""
    for text in map(str, (plan.storage, plan.name, plan.data, *plan.scenes)):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{ascii(text)}: cannot be read in the encoding of this locale; rename it, or set "
                "LC_ALL=C.UTF-8"
            ) from None
        if any(sign.isascii() and not sign.isprintable() for sign in text):
            raise ValueError(f"{ascii(text)}: holds characters that cannot be printed; rename it")


def _check_still_there(plan: Plan) -> None:
    if plan.data is None:
        return
    lost = [scene for scene in plan.scenes if not (plan.data / scene).is_dir()]
    if lost:
        raise ValueError(
            f"{plan.data / lost[0]}: no such folder; `--resume --name {_pasted(plan.name)} --data "
            "FOLDER` goes on with photographs that have moved to another folder"
        )


def _know_photographs(plan: Plan) -> dict[str, str]:
    """Fingerprints of the photographs of each scene; those that have moved since the study was
    started must be the same."""
    if plan.data is None:
        return {}
    file, width = plan.folder / _REQUEST_FILE, plan.base.data.width
    before = load_yaml(file) if file.exists() else {}
    known = before.get("photographs")
    if known and before["data"] == str(plan.data):
        return known
    found = {scene: fingerprint(plan.scene_folder(scene, width), width) for scene in plan.scenes}
    if before and found != known:
        other = [scene for scene in plan.scenes if not known or found[scene] != known.get(scene)]
        raise ValueError(
            f"{plan.data / other[0]}: not the photographs that study {plan.name} was started with; "
            f"those were in {before['data']}; give another --name to search on others"
        )
    return found


def _check_same_request(plan: Plan, request: dict[str, Any]) -> None:
    """A study is one search: other scenes or another space need another name."""
    file = plan.folder / _REQUEST_FILE
    if not file.exists():
        return
    before = load_yaml(file)
    was, now = _comparable(before), _comparable(request)
    different = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    if different:
        moved = f"; its photographs were in {before['data']}" if "data" in different else ""
        raise ValueError(
            f"study {plan.name} was started with other {', '.join(different)} "
            f"({file}){moved}; give another --name, or --resume to go on as it was"
        )


def _check_same_resolution(plan: Plan) -> None:
    """`auto` means another size where there are GPUs."""
    file = plan.folder / _REQUEST_FILE
    before = load_yaml(file).get("resolution") if file.exists() else None
    if before not in (None, plan.resolution):
        raise ValueError(
            f"study {plan.name} was started at {before} ({file}), and here `auto` means "
            f"{plan.resolution}; give --resolution {before}, --resume or another --name"
        )


def _with_same_precision(plan: Plan) -> Plan:
    """With what `auto` was where the study was started; on other machines it may be another one."""
    file = plan.folder / _REQUEST_FILE
    before = load_yaml(file).get("precision") if file.exists() else None
    return plan.with_precision(before) if before else plan


def _comparable(request: dict[str, Any]) -> dict[str, Any]:
    spec = {k: v for k, v in request["spec"].items() if k not in ("trials", "resources")}
    # Photographs may move; whether they are the same is asked by their fingerprints.
    return spec | {"scenes": request.get("scene_names"), "data": request["data"] is not None}


def _count_views(plan: Plan) -> dict[str, int]:
    """Views of each scene, with everything checked but the pixels."""
    return check_scenes(
        plan.scenes, plan.data, plan.base.data, "`{}: {}` under `fixed` of --config".format
    )


def _describe(plan: Plan, views: dict[str, int]) -> None:
    spec, data = plan.spec, plan.base.data
    print(f"study      {plan.name}")
    if plan.data is None:
        print(
            f"data       built-in scenes, for there is no LLFF data under {DEFAULT_DATA}, --data "
            f"or ${DATA_VARIABLE}; results are not comparable with the paper"
        )
    else:
        print(f"data       {plan.source}")
    print(f"scenes     {', '.join(f'{scene} ({count})' for scene, count in views.items())}")
    if plan.data is not None:
        print(f"read from  {describe_photographs(plan.scenes, plan.data, data.width)}")
    print(
        f"method     {plan.method}, images {data.width} wide from {data.width // data.scale} wide"
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
    """No machine joins a local Ray, so what does not fit now never will."""
    if address is None and num_slots(plan) == 0:
        spec, has = plan.spec.resources, ray.cluster_resources()
        raise ValueError(
            f"a training run needs {spec.workers * spec.cpus_per_worker} "
            f"CPUs and {spec.workers * plan.gpus_per_worker} GPUs, this machine has "
            f"{has.get('CPU', 0):.0f} and {has.get('GPU', 0):.0f}; lower `resources`, or give "
            "--address of a cluster"
        )


def _price(plan: Plan) -> None:
    device = choose_device()
    scene = plan.load_scene(plan.scenes[0], plan.base.data)
    num_together = len(plan.scenes) // len(plan.trainings)
    estimate = calibrate(plan.base, scene, device, num_together=num_together, num_rungs=plan.rungs)
    print(
        f"estimate   {estimate.field_seconds:.1f} s for a field, "
        f"{estimate.refiner_seconds:.1f} s for a refiner (calibrated on {scene.name}, {device})"
    )
    if plan.spec.stopping.rule != "none":
        print(f"           before {plan.spec.stopping.rule} stops anything:")
    slots, gpus = num_slots(plan), plan.gpus_per_worker * plan.spec.resources.workers
    for count in (1, 4, 8):
        if runs := int(count / gpus) if gpus else count:
            minutes = estimate.wall_seconds(plan, runs) / 60
            what = "GPUs" if gpus else "runs at a time"
            print(f"           {minutes:8.1f} min with {count} {what}")
    if slots:
        minutes = estimate.wall_seconds(plan, slots) / 60
        print(f"           {minutes:8.1f} min on this machine, {slots} runs at a time")
    hours = estimate.run_hours(plan) * (gpus or 1)
    print(f"           {hours:8.2f} {'GPU-hours' if gpus else 'hours'} in all")
    if gpus and device.type == "cpu":
        print("           timed without a GPU, on which all of it takes less")


def _bytes_needed(plan: Plan, views: dict[str, int]) -> int:
    """Renders of all views, a checkpoint of each training, as much again for MLflow's copies."""
    image = plan.base.data.width**2 * 3 // 4
    field = _FIELD_BYTES * image + 20_000_000
    fields = plan.spec.trials * len(plan.scenes) if not plan.shares_fields else len(plan.scenes)
    size = fields * field + sum(views.values()) * image * 5
    if plan.stage == "refiner":  # weights and both averages of Adam
        size += plan.spec.trials * len(plan.trainings) * count_parameters(plan.base) * 12
    return 2 * size


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
def _alone(plan: Plan) -> Iterator[None]:
    """Nobody else searches this study meanwhile."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(plan.folder / "search.lock", timeout=0):
            yield
    except Timeout:
        raise ValueError(
            f"study {plan.name} is under way in another process; `cbnerf report "
            f"{_pasted(plan.name)}` shows how far it is, another --name starts another one"
        ) from None

"""What a study computes: the request of a command line, kept as `request.yaml` in its folder."""

import shlex
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cbnerf.data.captures import fingerprint
from cbnerf.data.library import check_scenes, default_storage
from cbnerf.files import atomic_write_text
from cbnerf.search.plan import Plan, make_plan
from cbnerf.search.spec import parse_spec
from cbnerf.strict_yaml import load_yaml

_FILE = "request.yaml"


@dataclass(kw_only=True)
class Options:
    """Search hyper-parameters of Codebook-NeRF over several scenes with Ray, Optuna and MLflow."""

    scenes: str = "all"
    """`all`, or names of scenes separated by commas; put a name with a comma in double quotes."""
    config: Path | None = None
    """Search specification; default: `tune_configs/default.yaml`."""
    data: Path | None = None
    """Folder of scene folders; default: $CBNERF_DATA, else data/nerf_llff_data, else `data` in
    $CBNERF_STORAGE, else the built-in scenes."""
    trials: int | None = None
    """Number of configurations; a larger number extends a finished study."""
    resolution: str | None = None
    """Image size; overrides the specification."""
    method: str | None = None
    """Method; overrides the specification."""
    name: str | None = None
    """Name of the study; default: method, resolution and scenes."""
    resume: bool = False
    """Resume the study `--name` without repeating its other options. (Rerunning the same command
    resumes, too.)"""
    storage: Path = field(default_factory=default_storage)
    """Folder for studies, cache and MLflow; default: $CBNERF_STORAGE or `runs`. On a cluster all
    machines must share it."""
    concurrency: int | None = None
    """Maximum number of concurrent training runs; default: as many as the machines hold and, on a
    cluster, as many again that wait for machines to join. With 1, a seed determines trials and
    values on a CPU, bit for bit."""
    cache: str | None = None
    """URI of a store through which several clusters share trained stages, such as
    s3://bucket/cache."""
    confirm: int = 0
    """Train the three best configurations again with this many other seeds, and choose by the means
    over those."""
    gpus: float | None = None
    """GPUs per process of a training run, at most 1; overrides the specification. Needed if
    machines with GPUs join only after trainings request them."""
    address: str | None = None
    """Ray cluster to run on, such as `auto`; default: start a local Ray."""
    dry_run: bool = False
    """Print the plan and its estimated cost, and stop."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that decides what a study computes, in plain values."""

    scenes: str
    """As in `--scenes`."""
    data: str | None
    """Folder of scene folders; None for the built-in scenes."""
    spec: dict[str, Any]
    """The specification as written, with the overrides of the command line."""
    scene_names: list[str] = field(default_factory=list)
    photographs: dict[str, str] = field(default_factory=dict)
    """Fingerprint of the photographs of each scene."""
    resolution: str | None = None
    """Image size and schedule, as chosen for the machines that started the study."""
    precision: str | None = None

    @classmethod
    def read(cls, folder: Path) -> "Request | None":
        """The request of the study in a folder, if one was started there."""
        file = folder / _FILE
        return cls(**load_yaml(file)) if file.exists() else None

    def write(self, folder: Path) -> None:
        atomic_write_text(folder / _FILE, yaml.safe_dump(asdict(self), sort_keys=False))

    @property
    def search(self) -> dict[str, Any]:
        """What must stay the same when a study resumes: all but the number of trials, the resources
        and the folder of the photographs."""
        spec = {k: v for k, v in self.spec.items() if k not in ("trials", "resources")}
        return spec | {"scenes": self.scene_names, "data": self.data is not None}


class Settled(NamedTuple):
    """A request whose `auto` values are settled, with everything checked but the pixels."""

    request: Request
    plan: Plan
    views: dict[str, int]
    """Number of views of each scene."""
    before: Request | None
    """The request with which the study was started, if it resumes."""


def read_request(options: Options, default_config: Path) -> Request:
    """The request of a command line; with `--resume` that of the study."""
    request = _find_request(options) if options.resume else _new_request(options, default_config)
    spec = dict(request.spec)
    if options.trials is not None:
        spec["trials"] = options.trials
    if options.gpus is not None:
        spec["resources"] = spec.get("resources", {}) | {"gpus_per_worker": options.gpus}
    return replace(request, spec=spec)


def _new_request(options: Options, default_config: Path) -> Request:
    file = options.config or default_config
    content = load_yaml(file)
    overrides = {"resolution": options.resolution, "method": options.method}
    content |= {name: value for name, value in overrides.items() if value is not None}
    try:
        parse_spec(content)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    data = str(options.data.resolve()) if options.data else None
    return Request(scenes=options.scenes, data=data, spec=content)


def _find_request(options: Options) -> Request:
    """The request of the study `--name`; `--data` gives another folder of its photographs."""
    fixed = ("config", "resolution", "method")
    repeated = [name for name in fixed if getattr(options, name) is not None]
    repeated += ["scenes"] if options.scenes != "all" else []
    if repeated:
        raise ValueError(f"--resume keeps the options of the study; leave out --{repeated[0]}")
    studies = options.storage / "studies"
    known = sorted(file.parent.name for file in studies.glob(f"*/{_FILE}"))
    if options.name is None:
        raise ValueError("--resume: give the study's --name")
    request = Request.read(studies / options.name) if options.name in known else None
    if request is None:
        raise ValueError(
            f"no study {options.name!r} in {studies}; "
            + (f"there are {', '.join(known)}" if known else "it holds none")
        )
    if options.data and not request.data:
        raise ValueError(f"--data: study {options.name} was started on built-in scenes")
    return replace(request, data=str(options.data.resolve())) if options.data else request


def _plan(request: Request, options: Options, *, has_gpu: bool) -> Plan:
    """The plan of a request. `--resume` keeps the scenes of the study, as others may have been
    added to the folder since."""
    names = tuple(request.scene_names) if options.resume else ()
    plan = make_plan(
        parse_spec(request.spec),
        scenes=names or request.scenes,
        data=Path(request.data) if request.data else None,
        name=options.name,
        storage=options.storage,
        has_gpu=has_gpu,
        resolution=request.resolution,
        cache_store=options.cache,
    )
    return plan.with_precision(request.precision) if request.precision else plan


def plan_study(storage: Path, name: str) -> Plan:
    """The plan of a study that was started; its photographs are not read."""
    options = Options(storage=storage, name=name, resume=True)
    return _plan(_find_request(options), options, has_gpu=False)


def settle(request: Request, options: Options, *, has_gpu: bool | None) -> Settled:
    """Plan a request and check it; `has_gpu` is None before the cluster is known."""
    plan = _plan(request, options, has_gpu=bool(has_gpu))
    _check_names(plan)
    if options.resume:
        _check_photographs_exist(plan)
    data = str(plan.data) if plan.data else None
    request = replace(request, data=data, scene_names=list(plan.scenes))
    before = Request.read(plan.folder)
    if before is not None:
        _check_same(plan, before, request)
        if has_gpu is not None:
            _check_same_resolution(plan, before)
        if before.precision:
            plan = plan.with_precision(before.precision)
    views = check_scenes(
        plan.scenes, plan.data, plan.base.data, "`{}: {}` under `fixed` of --config".format
    )
    return Settled(request, plan, views, before)


def fingerprint_photographs(settled: Settled) -> dict[str, str]:
    """Fingerprint of the photographs of each scene; ValueError if they are in another folder and
    differ from those that the study was started with."""
    plan, before = settled.plan, settled.before
    if plan.data is None:
        return {}
    known = before.photographs if before else {}
    if before and known and before.data == str(plan.data):
        return known
    width = plan.base.data.width
    found = {scene: fingerprint(plan.scene_folder(scene, width), width) for scene in plan.scenes}
    if before and found != known:
        other = [scene for scene in plan.scenes if found[scene] != known.get(scene)]
        raise ValueError(
            f"{plan.data / other[0]}: not the photographs that study {plan.name} was started with; "
            f"those were in {before.data}; give another --name to search on others"
        )
    return found


def _check_names(plan: Plan) -> None:
    """Refuse names that cannot be written into a report or MLflow."""
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


def _check_photographs_exist(plan: Plan) -> None:
    if plan.data is None:
        return
    lost = [scene for scene in plan.scenes if not (plan.data / scene).is_dir()]
    if lost:
        raise ValueError(
            f"{plan.data / lost[0]}: no such folder; `--resume --name {shlex.quote(plan.name)} "
            "--data FOLDER` resumes with photographs that have moved to another folder"
        )


def _check_same(plan: Plan, before: Request, request: Request) -> None:
    """A study is one search: other scenes or another space need another name."""
    was, now = before.search, request.search
    different = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    if different:
        moved = f"; its photographs were in {before.data}" if "data" in different else ""
        raise ValueError(
            f"study {plan.name} was started with other {', '.join(different)} "
            f"({plan.folder / _FILE}){moved}; give another --name, or --resume to continue it"
        )


def _check_same_resolution(plan: Plan, before: Request) -> None:
    """Image size and schedule depend on whether the cluster has GPUs."""
    was = before.resolution
    if was not in (None, plan.resolution):
        raise ValueError(
            f"study {plan.name} was started at {was} ({plan.folder / _FILE}), and here it would be "
            f"{plan.resolution}; give --resolution {was}, --resume or another --name"
        )

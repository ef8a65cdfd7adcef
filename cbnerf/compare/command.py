"""The request of `cbnerf compare`, checked before anything is trained."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from cbnerf.compare.protocols import Protocol, adapt
from cbnerf.compare.run import Comparison
from cbnerf.config import Config
from cbnerf.data.library import (
    check_scenes,
    choose_scenes,
    default_storage,
    locate_data,
    split_list,
)
from cbnerf.nerf.model import settle_precision
from cbnerf.overrides import load_config, read_knob, with_overrides
from cbnerf.presets import DEFAULT_METHOD, METHODS, choose_resolution, preset
from cbnerf.strict_yaml import shown
from cbnerf.training.distributed import choose_device


@dataclass(kw_only=True)
class Request:
    """Train the missing stages of several methods, and score all methods by one protocol."""

    scenes: str = "all"
    """`all`, or names of scenes separated by commas; put a name with a comma in double quotes."""
    methods: str = "all"
    """`all`, or names separated by commas; a YAML file, such as a study's best.yaml, is a method
    as well. Put a name with a comma in double quotes."""
    protocol: Protocol = "holdout"
    """`holdout`; `unseen-scene` trains stage 2 on the other scenes only; `low-res-only` on the
    low-res photographs of the scene; `table1` is the released scoring, for the published comparison
    only."""
    resolution: str | None = None
    """Image size and schedule; default: x2-504 with a GPU, else x2-128."""
    data: Path | None = None
    """Folder of scene folders; default: $CBNERF_DATA, else data/nerf_llff_data, else `data` in
    $CBNERF_STORAGE, else the built-in scenes."""
    storage: Path = field(default_factory=default_storage)
    """Folder for the cache of trained stages; default: $CBNERF_STORAGE or `runs`."""
    output: Path | None = None
    """Folder for the report; default: a folder in the storage."""
    knobs: tuple[str, ...] = ()
    """NAME=VALUE for all methods, such as field.optim.steps=100."""


def settle(request: Request) -> Comparison:
    """The comparison of a request; ValueError if its methods or scenes cannot be compared."""
    resolution = choose_resolution(request.resolution, has_gpu=torch.cuda.is_available())
    methods = _load_methods(request, resolution)
    _check_methods(methods, request.protocol)
    folder, available = locate_data(request.data)
    scenes = choose_scenes(request.scenes, available, folder)
    if request.protocol == "unseen-scene" and len(scenes) < 2:
        raise ValueError(
            "--protocol unseen-scene needs at least 2 scenes; stage 2 learns on others"
        )
    data = next(iter(methods.values())).data
    check_scenes(scenes, folder, data, "--knobs {}={}".format)
    return Comparison(
        methods=methods,
        protocol=request.protocol,
        resolution=resolution,
        scenes=scenes,
        data=folder,
        storage=request.storage.resolve(),
    )


def report_folder(request: Request, comparison: Comparison) -> Path:
    """The folder for the report."""
    name = f"{comparison.resolution}-{comparison.protocol}"
    folder = request.output or comparison.storage / "compare" / name
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder}: not a folder")
    return folder


def _load_methods(request: Request, resolution: str) -> dict[str, Config]:
    """The configurations of `--methods` with `--knobs`, by label."""
    all_methods = request.methods == "all"
    names = list(METHODS) if all_methods else split_list("--methods", request.methods)
    changes = _read_knobs(request.knobs)
    methods: dict[str, Config] = {}
    for name in map(str.strip, names):
        config, label = _load_method(name, resolution), _label(name)
        if label in methods:
            raise ValueError(f"--methods: {label!r} is named twice")
        config = adapt(with_overrides(config, changes), request.protocol)
        methods[label] = settle_precision(config, choose_device())
    return methods


def _check_methods(methods: dict[str, Config], protocol: Protocol) -> None:
    """ValueError for methods that this protocol cannot score, or not on equal images."""
    first = next(iter(methods))
    for name, config in methods.items():
        if config.data != methods[first].data:
            raise ValueError(
                f"--methods: {name} and {first} have different knobs of `data`; only equal images "
                "can be compared"
            )
        if config.data.test_every == 0 and protocol != "table1":
            raise ValueError(
                "data.test_every = 0 leaves no view to score; --protocol table1 scores such methods"
            )
        if config.codebook.shared and protocol == "table1":
            raise ValueError(
                f"--methods: {name} has codebook.shared, but table1 takes the best evaluation of "
                "each scene's own refiner; choose another protocol"
            )


def _load_method(name: str, resolution: str) -> Config:
    """A preset, or the default method with the knobs of a file."""
    if name in METHODS or not name.endswith((".yaml", ".yml")):
        return preset(name, resolution)
    usual = preset(DEFAULT_METHOD, resolution)
    config = load_config(Path(name), usual)
    if (config.data.width, config.data.scale) != (usual.data.width, usual.data.scale):
        raise ValueError(
            f"{name}: for images {config.data.width} wide at scale {config.data.scale}, but "
            f"{resolution} is {usual.data.width} at scale {usual.data.scale}; give --resolution"
        )
    return config


def _label(name: str) -> str:
    """The name of a preset, or of a file and its folder."""
    if name in METHODS:
        return name
    path = Path(name).resolve()
    return f"{path.parent.name} {path.stem}"


def _read_knobs(texts: tuple[str, ...]) -> dict[str, object]:
    knobs: dict[str, object] = {}
    for name, value in map(_read_knob, texts):
        if name in knobs:
            raise ValueError(f"--knobs: {name} is named twice")
        knobs[name] = value
    return knobs


def _read_knob(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--knobs {shown(text)} is not NAME=VALUE")
    try:
        return name, read_knob(name, value)
    except ValueError as error:
        raise ValueError(f"--knobs {shown(text)}: {error}") from None

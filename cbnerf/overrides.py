"""Strict overrides of knobs by dotted name, and configurations as YAML files."""

import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from cbnerf.config import Config, flatten
from cbnerf.files import atomic_write_text
from cbnerf.strict_yaml import load_yaml, parse_yaml, shown


def knob_type(name: str) -> Any:
    """The annotated type of a knob, such as `int` for `codebook.size`."""
    kind: Any = Config
    for part in name.split("."):
        hints = typing.get_type_hints(kind) if is_dataclass(kind) else {}
        if part not in hints:
            raise ValueError(f"unknown knob {shown(name)}{_suggestion(name)}")
        kind = hints[part]
    if is_dataclass(kind):
        raise ValueError(f"{name!r} is a group of knobs, not a knob{_suggestion(name)}")
    return kind


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name, flatten(Config()), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def cast(name: str, value: Any) -> Any:
    """A value read from YAML or a command line, checked against the type of the knob `name`."""
    kind = knob_type(name)
    try:
        return _cast(kind, value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} = {shown(value)} is not {_describe(kind)}") from None


def _cast(kind: Any, value: Any) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in args:
            raise ValueError
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError
        return tuple(_cast(args[0], item) for item in value)
    if kind is bool or isinstance(value, bool):
        if kind is not bool or not isinstance(value, bool):
            raise TypeError
        return value
    if not isinstance(value, int | float | str):  # such as bytes, which int() would parse
        raise TypeError
    if kind is int:
        if isinstance(value, float) and value != int(value):
            raise ValueError
        return int(value)
    if kind is float:
        return float(value)
    raise TypeError(kind)


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    if isinstance(kind, types.GenericAlias):
        return "a list of integers"
    return {int: "an integer", float: "a number", bool: "true or false"}[kind]


def read_knob(name: str, text: str) -> Any:
    """The value of a knob from its text in YAML; ValueError if it has another type."""
    return cast(name, parse_yaml(text))


def with_overrides(config: Config, overrides: Mapping[str, Any]) -> Config:
    """A copy with some knobs changed; an unknown name or a wrong type is a `ValueError`."""
    return _replace_knobs(config, {name: cast(name, value) for name, value in overrides.items()})


def _replace_knobs(node: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Replace all at once, because the checks of a group may involve several of its knobs."""
    changed = {}
    for knob in fields(node):
        name, value = prefix + knob.name, getattr(node, knob.name)
        if is_dataclass(value):
            changed[knob.name] = _replace_knobs(value, values, name + ".")
        elif name in values:
            changed[knob.name] = values[name]
    return replace(node, **changed)


def save_config(config: Config, path: Path) -> None:
    """Write all knobs as plain YAML."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in flatten(config).items()}
    atomic_write_text(path, yaml.safe_dump(plain, sort_keys=False))


def load_config(path: Path, base: Config | None = None) -> Config:
    """Read a file of `save_config`; missing knobs keep their values in `base` (default:
    `Config()`)."""
    try:
        return with_overrides(base or Config(), load_yaml(path))
    except ValueError as error:
        message = str(error)
        raise ValueError(message if str(path) in message else f"{path}: {message}") from None

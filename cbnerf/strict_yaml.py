"""Strict YAML: no surprising values, and errors of one line.

YAML 1.1 keeps the last of two equal keys, and reads 010 as 8, 1:30 as 90 and 1e-3 as a string.
"""

import re
import reprlib
from pathlib import Path
from typing import Any

import yaml

MOST = 2**63
"""Upper bound of the absolute value of numbers."""


class _Short(reprlib.Repr):
    """Abbreviates values: with aliases, a short YAML file can hold a huge one."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 2, 80, 80

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if abs(x) < MOST else "a huge integer"


shown = _Short().repr
"""A value in one short line, for messages."""


class _StrictLoader(yaml.SafeLoader):
    """Refuses duplicate keys and numbers such as 010 and 1:30; reads 1e-3 as a number."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"{shown(twice)} stands twice", node.start_mark
            )
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        text = node.value
        if ":" in text or re.fullmatch(r"[-+]?0[0-9_]+", text):
            raise yaml.constructor.ConstructorError(
                None, None, f"{shown(text)} is not a plain number", node.start_mark
            )
        if node.tag.endswith(":int"):
            return self.construct_yaml_int(node)
        return self.construct_yaml_float(node)


for _kind in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _StrictLoader.construct_number)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)  # fmt: skip


_TROUBLE = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError)
"""Errors that PyYAML raises for bad content, such as month 13 of a date or an empty `!!int`."""


def parse_yaml(content: str | bytes) -> Any:
    """Parse YAML into plain values; a mistake is a `ValueError` of one line. Bytes are UTF-8, or
    UTF-16 with a byte order mark."""
    try:
        return yaml.load(content, _StrictLoader)
    except RecursionError:
        raise ValueError("not readable as YAML (nested too deep)") from None
    except _TROUBLE as error:
        raise ValueError(f"not readable as YAML ({' '.join(str(error).split())})") from None


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; a mistake is a `ValueError` of one line that names the file."""
    try:
        loaded = parse_yaml(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (ValueError, OSError) as error:
        problem = str(error) if isinstance(error, ValueError) else f"not readable ({error})"
        raise ValueError(f"{path}: {problem}") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: expected `name: value` lines, found {type(loaded).__name__}")
    unnamed = [key for key in loaded if not isinstance(key, str)]
    if unnamed:
        raise ValueError(f"{path}: {shown(unnamed[0])} is not a name")
    return loaded

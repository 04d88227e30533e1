"""Reads untrusted YAML files with bounded time and memory, and flattens their content."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from magnet_train.common.errors import UserError

MAX_BYTES = 2**20
MAX_DEPTH = 20
"""Maximum depth of mappings for `flatten`."""
MAX_ENTRIES = 100_000
"""Maximum number of values after alias expansion; nine lines can expand to a billion."""


class _Loader(yaml.SafeLoader):
    """Rejects duplicate keys, of which PyYAML silently keeps the last, and null characters."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [name for name, count in names.items() if count > 1 and name != "<<"]:
            raise ComposerError(None, None, f"{twice[0]} is given twice", node.start_mark)
        return node

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if "\0" in str(value):  # a path with it raises ValueError wherever it is used
            raise ConstructorError(None, None, "has a null character", node.start_mark)
        return value


def read_yaml(path: Path, shown: str) -> Any:
    """Read a YAML file of plain values.

    Args:
        path: the file.
        shown: its name in messages, such as `--config FILE`.

    Raises:
        UserError: if it is not a regular file with valid UTF-8 YAML, or too large.
    """
    if not path.is_file():
        problem = "not a regular file" if path.exists() else "no such file"
        raise UserError(f"{shown}: {problem}; give a YAML file")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{shown}: larger than {MAX_BYTES:,} bytes; give a YAML file")
        return parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        raise UserError(f"{shown}: not UTF-8 text ({reason})") from error
    except OSError as error:
        raise UserError(f"{shown}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{shown}: not valid YAML ({error})") from error


def parse_yaml(text: str) -> Any:
    """The plain values in a YAML text.

    Raises:
        ValueError: with a reason in one line, if it is not valid, has a key twice, or expands to
            too many values.
    """
    try:
        content = yaml.load(text, _Loader)
        if (number := _num_entries(content, {})) > MAX_ENTRIES:
            raise ValueError(f"its aliases expand to {number:,} values, at most {MAX_ENTRIES:,}")
        return content
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from error


def _num_entries(value: Any, known: dict[int, int]) -> int:
    """Number of values in a nested value, with expanded aliases.

    Raises:
        ValueError: if a value contains itself.
    """
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = -1
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_num_entries(part, known) for part in parts)
    if known[id(value)] < 0:
        raise ValueError("an alias refers to itself")
    return known[id(value)]


def flatten(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values, in order; an empty mapping is a value.

    Raises:
        ValueError: if mappings are nested deeper than `MAX_DEPTH`, or contain themselves.

    >>> dict(flatten({"model": {"dim": 64, "text": {}}, "seed": 1}))
    {'model.dim': 64, 'model.text': {}, 'seed': 1}
    """
    if prefix.count(".") > MAX_DEPTH:
        raise ValueError("nested without end")
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

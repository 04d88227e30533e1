"""YAML files of strangers, read with bounded time and memory."""

from pathlib import Path
from typing import Any

import yaml

from magnet_train.common.errors import UserError

MAX_BYTES = 2**20
MAX_ENTRIES = 100_000
"""Values in a file once its aliases are written out; nine lines can hold a thousand million."""


def read_yaml(path: Path, shown: str) -> Any:
    """What a YAML file holds: plain values only.

    Args:
        path: of the file.
        shown: how messages name it, such as `--config FILE`.

    Raises:
        UserError: if it is no regular file of UTF-8 text and valid YAML, or too large.
    """
    if not path.is_file():
        problem = "not a regular file" if path.exists() else "no such file"
        raise UserError(f"{shown}: {problem}; give a YAML file")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{shown}: larger than {MAX_BYTES:,} bytes; give a YAML file")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if (number := _num_entries(content, {})) > MAX_ENTRIES:
            raise ValueError(f"its aliases stand for {number:,} values, at most {MAX_ENTRIES:,}")
        return content
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        raise UserError(f"{shown}: not UTF-8 text ({reason})") from error
    except OSError as error:
        raise UserError(f"{shown}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{shown}: not valid YAML ({reason})") from error


def _num_entries(value: Any, known: dict[int, int]) -> int:
    """Values in a nested value, those behind an alias counted wherever it stands.

    Raises:
        ValueError: if a value is a part of itself.
    """
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = -1
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_num_entries(part, known) for part in parts)
    if known[id(value)] < 0:
        raise ValueError("an alias stands within what it stands for")
    return known[id(value)]

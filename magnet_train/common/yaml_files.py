"""YAML files of strangers, read with bounded time and memory."""

from pathlib import Path
from typing import Any

import yaml

from magnet_train.common.errors import UserError

MAX_BYTES = 2**20
MAX_ALIASES = 100
"""A file with more aliases than this may expand to more than memory holds."""


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
        text = path.read_text(encoding="utf-8")
        events = yaml.parse(text, Loader=yaml.SafeLoader)
        num_aliases = sum(isinstance(event, yaml.AliasEvent) for event in events)
        if num_aliases > MAX_ALIASES:
            raise UserError(f"{shown}: {num_aliases} YAML aliases; at most {MAX_ALIASES} are read")
        return yaml.safe_load(text)
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        raise UserError(f"{shown}: not UTF-8 text ({reason})") from error
    except OSError as error:
        raise UserError(f"{shown}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{shown}: not valid YAML ({reason})") from error

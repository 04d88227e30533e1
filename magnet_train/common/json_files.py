"""Reads untrusted JSON files with bounded time and memory."""

import json
from pathlib import Path
from typing import Any

from magnet_train.common.folders import require_file

MAX_BYTES = 10_000_000
"""Maximum size of a configuration."""


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """The value in a JSON file.

    Raises:
        OSError: if it is missing, unreadable or not a regular file, which could block.
        ValueError: if it is too large, not UTF-8, not JSON, or nested too deeply.
    """
    require_file(path)
    if path.stat().st_size > max_bytes:
        raise ValueError(f"larger than {max_bytes:,} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error

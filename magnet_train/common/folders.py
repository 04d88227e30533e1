"""Folders that can be written to, and small files that are whole or not there."""

import json
import os
import socket
from pathlib import Path
from typing import Any

from magnet_train.common.errors import UserError


def writable_folder(folder: Path) -> Path:
    """The folder, made where it is missing.

    Raises:
        UserError: if nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{socket.gethostname()}-{os.getpid()}"  # of several ranks each has its own
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"run folder {folder}: cannot be written ({error.strerror}); set --trainer.default_root_dir to another"
        ) from error
    return folder


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes aside and moves into place."""
    path.with_suffix(".tmp").write_text(text)
    os.replace(path.with_suffix(".tmp"), path)

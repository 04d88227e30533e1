"""The environment of a run: commit of the code, versions, hardware."""

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import magnet_train
from magnet_train.common.folders import write_json
from magnet_train.common.products import products


def environment(num_ranks: int) -> dict[str, Any]:
    """Plain values, without paths or names of machines or people."""
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "magnet_train": magnet_train.__version__,
        "commit": commit_of(Path(magnet_train.__file__).parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": importlib.metadata.version("lightning"),
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "float32_products": products(),
        "num_ranks": num_ranks,
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
    }


def commit_of(folder: Path) -> str | None:
    """The git commit of a folder, with `-dirty` if tracked files have changed; None outside git.

    Also None for a package installed inside another repository, e.g. in `.venv`.
    """

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=30
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def add_environment(folder: Path, session: dict[str, Any]) -> None:
    """Append to `environment.json`, which has an entry per session."""
    file = folder / "environment.json"
    try:
        before = json.loads(file.read_text())
    except (OSError, ValueError):
        before = []
    sessions = before if isinstance(before, list) else []
    write_json(file, [*sessions, session])

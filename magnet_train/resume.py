"""Resuming a run: finds the checkpoint, checks that it fits the run, and computes the batch.

Order, crops, masks and dropout depend only on the configuration and the number of completed
batches. So resuming needs only weights, optimizer state and this number.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from magnet_train.common.errors import UserError, integer_from_environment
from magnet_train.common.pretrained import one_line
from magnet_train.release import check_checkpoint_weights, read_checkpoint

WEIGHTS_PARTS = {"state_dict": dict, "hyper_parameters": dict}
"""Entries of a checkpoint required for validation, and their types."""
PARTS = WEIGHTS_PARTS | {
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
    "callbacks": dict,
}
"""Entries of a checkpoint that resuming needs, and their types."""
RUN_PARTS = {"train", "codec", "text_encoder"}
"""Entries of `run` in a checkpoint that are compared with a run's data."""


@dataclass(frozen=True)
class Layout:
    """How an optimizer step is divided among ranks; the data order depends on it."""

    ranks: int
    batch_size: int
    """Examples per batch on each rank."""
    accumulated: int
    """Batches of each rank in an optimizer step."""
    workers: int
    """Loader processes of each rank."""

    def __str__(self) -> str:
        return (
            f"{self.ranks} ranks x {self.batch_size} examples x {self.accumulated} accumulated "
            f"batches, {self.workers} data workers each"
        )

    def batches(self, done: int, before: "Layout") -> int:
        """Convert `done` batches of layout `before` to batches of this one, rounded down.

        >>> Layout(3, 4, 1, 0).batches(100, before=Layout(2, 4, 1, 0))
        66
        """
        examples = done * before.ranks * before.batch_size
        step = self.ranks * self.batch_size * self.accumulated
        return examples // step * self.accumulated


def requeue_count() -> int:
    """Number of times that SLURM has requeued this job; 0 outside SLURM.

    Raises:
        UserError: if the environment variable is not a number.
    """
    return integer_from_environment("SLURM_RESTART_COUNT")


def newest_intact_checkpoint(folders: Iterable[Path]) -> Path | None:
    """The intact checkpoint with the most optimizer steps in these folders, or None.

    Damaged checkpoints are skipped with a warning. Of several with equal steps, the latest is used.
    """
    found: dict[Path, tuple[int, float]] = {}
    for path in {
        path.resolve(): path
        for folder in folders
        for path in folder.glob("*.ckpt")
        if path.is_file()
    }.values():
        with _skipping_damaged(path):
            found[path] = _checked_step(path, _mapped(path)), path.stat().st_mtime
    for path in sorted(found, key=found.__getitem__, reverse=True):
        with _skipping_damaged(path):
            read_training_checkpoint(path)
            return path
    return None


def later_checkpoints(folder: Path, than: Path) -> list[Path]:
    """The intact checkpoints in a folder with more optimizer steps than another checkpoint has."""
    steps: dict[Path, int] = {}
    for path in (than, *folder.glob("*.ckpt")):
        with _skipping_damaged(path):
            steps[path] = _checked_step(path, _mapped(path))
    return [path for path, step in steps.items() if step > steps.get(than, math.inf)]


def _mapped(path: Path) -> Any:
    """A checkpoint's content, without verification, which would read the file completely."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


@contextmanager
def _skipping_damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the readers of zip and pickle may raise any type
        reason = (
            str(error)
            if isinstance(error, UserError)
            else f"{path}: damaged ({one_line(error, 200)})"
        )
        warnings.warn(f"skipping checkpoint {reason}", stacklevel=4)


def check_named_checkpoint(path: Path, is_fit: bool) -> dict[str, Any]:
    """Check that Lightning can load a checkpoint, before files are created; returns its content.

    Args:
        path: the file.
        is_fit: whether training resumes from it; otherwise only its weights are used.

    Raises:
        UserError: as `read_training_checkpoint`, or if its weights are of another shape or type, or
            not finite.
    """
    parts = PARTS if is_fit else WEIGHTS_PARTS
    checkpoint = read_training_checkpoint(path, parts | {"pytorch-lightning_version": str})
    check_checkpoint_weights(checkpoint, path)
    return checkpoint


def read_training_checkpoint(path: Path, parts: Mapping[str, type] = PARTS) -> dict[str, Any]:
    """Read and verify a checkpoint from which `fit` can resume.

    Args:
        path: the file.
        parts: entries that it must have, and their types.

    Raises:
        UserError: if the file is missing or damaged, contains more than plain data, or is not a
            checkpoint of a run.
    """
    checkpoint = read_checkpoint(path)
    _checked_step(path, checkpoint)
    for name, kind in parts.items():
        if not isinstance(checkpoint.get(name), kind):
            raise UserError(
                f"{path}: not a checkpoint of a training run ({name} is missing); choose another"
            )
    run = checkpoint.get("run", dict.fromkeys(RUN_PARTS))
    is_complete = isinstance(run, dict) and run.keys() >= RUN_PARTS
    if not isinstance(checkpoint["hyper_parameters"].get("network"), dict) or not is_complete:
        raise UserError(f"{path}: not a checkpoint of magnet_train; choose another")
    return checkpoint


def _checked_step(path: Path, checkpoint: Mapping[str, Any]) -> int:
    step = checkpoint.get("global_step") if isinstance(checkpoint, Mapping) else None
    if type(step) is not int or step < 0:
        raise UserError(
            f"{path}: not a checkpoint of a training run (global_step={step!r}); choose another"
        )
    return step


def shards_hash(index: Mapping[str, Any]) -> str:
    """16 hex digits that identify a set of shards by its codec and the shards' names, lengths and
    checksums."""
    shards = [
        [shard["name"], shard["num_examples"], shard.get("sha256")] for shard in index["shards"]
    ]
    content = json.dumps([index["codec"]["hash"], shards])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def check_same_model(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Check that a checkpoint's network and optimizer are the configured ones.

    Args:
        saved: `hyper_parameters` of the checkpoint, as plain values.
        current: the same for the configuration.

    Raises:
        UserError: if they differ; the message names the settings.
    """
    named = ("optimizer.name", "network.", "lora.")
    changed = [text for name, text in differing(saved, current) if name.startswith(named)]
    if changed:
        raise UserError(
            f"--ckpt_path: the checkpoint has another model: {', '.join(changed)}; use its "
            "settings, or another --trainer.default_root_dir to start a new run"
        )


def differing(
    saved: Mapping[str, Any], current: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, str]]:
    """Settings in both mappings that differ: names, and texts with both values.

    >>> differing({"seed": 1, "optimizer": {"lr": 0.1}}, {"seed": 1, "optimizer": {"lr": 0.2}})
    [('optimizer.lr', 'optimizer.lr=0.2 (checkpoint: 0.1)')]
    """
    found = []
    for name in sorted(saved.keys() & current.keys()):
        before = saved[name]
        now = current[name]
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            found += differing(before, now, f"{prefix}{name}.")
        elif _plain(before) != _plain(now):
            found.append((f"{prefix}{name}", f"{prefix}{name}={now} (checkpoint: {before})"))
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value

"""Going on where a run stopped: which checkpoint, whether it belongs to this run, and at which batch.

A run is a function of its configuration and of how many batches are done: order, crops, masks and dropouts belong to
their place. So weights, optimizer and one number are all that a resume needs.
"""

import hashlib
import json
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magnet_train.common.errors import UserError
from magnet_train.release import read_checkpoint


@dataclass(frozen=True)
class Layout:
    """How the work of an optimizer step is dealt out; on another one the data comes in another order."""

    ranks: int
    batch_size: int
    """Examples per batch on each rank."""
    accumulated: int
    """Batches of each rank in an optimizer step."""
    workers: int
    """Loader processes of each rank."""

    def __str__(self) -> str:
        return (
            f"{self.ranks} ranks x {self.batch_size} examples x {self.accumulated} accumulated batches, "
            f"{self.workers} loader processes each"
        )

    def batches(self, done: int, before: "Layout") -> int:
        """Batches of each rank that are done here, where `before` had done `done`: as many examples, or a few less.

        >>> Layout(3, 4, 1, 0).batches(100, before=Layout(2, 4, 1, 0))
        66
        """
        examples = done * before.ranks * before.batch_size
        step = self.ranks * self.batch_size * self.accumulated
        return examples // step * self.accumulated


def newest_whole_checkpoint(folders: Iterable[Path]) -> Path | None:
    """The checkpoint in the folders with the most optimizer steps that is whole; None if there is none.

    Whole means that it holds nothing but plain data and tensors, and that every byte of its zip has the checksum noted
    there. Each that is not is passed over with a warning that names it. Of two with as many steps the later one wins.
    """
    found: dict[Path, tuple[int, float]] = {}
    for path in {path.resolve(): path for folder in folders for path in folder.glob("*.ckpt")}.values():
        try:
            found[path] = int(read_checkpoint(path)["global_step"]), path.stat().st_mtime
        except (UserError, OSError, KeyError, TypeError, ValueError) as error:
            reason = str(error) if isinstance(error, UserError) else f"{path}: no checkpoint of a run"
            warnings.warn(f"passed over: {reason}", stacklevel=2)
    for path in sorted(found, key=found.__getitem__, reverse=True):
        try:
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()
        except (OSError, zipfile.BadZipFile, EOFError) as error:
            damaged = str(error)
        if damaged is None:
            return path
        warnings.warn(f"passed over: {path}: damaged ({damaged})", stacklevel=2)
    return None


def fingerprint(index: Mapping[str, Any]) -> str:
    """16 hex digits of what a set of shards holds: its codec, and name, length and checksum of each shard."""
    shards = [[shard["name"], shard["num_examples"], shard.get("sha256")] for shard in index["shards"]]
    content = json.dumps([index["codec"]["hash"], shards])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def check_same_model(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Whether a checkpoint's network and optimizer are the configured ones; both `hyper_parameters`, as plain values.

    Raises:
        UserError: that names the settings that differ.
    """
    changed = [text for name, text in differing(saved, own) if name == "optimizer.name" or name.startswith("network.")]
    if changed:
        raise UserError(
            f"--ckpt_path: the checkpoint's model is another: {', '.join(changed)}; give its settings, or another "
            "--trainer.default_root_dir to begin a new run"
        )


def differing(saved: Mapping[str, Any], own: Mapping[str, Any], within: str = "") -> list[tuple[str, str]]:
    """Names of the settings that both know and that differ, each with what it is here and there.

    >>> differing({"seed": 1, "optimizer": {"lr": 0.1}, "older": 2}, {"seed": 1, "optimizer": {"lr": 0.2}})
    [('optimizer.lr', 'optimizer.lr=0.2 (there 0.1)')]
    """
    found = []
    for name in sorted(saved.keys() & own.keys()):
        one, two = saved[name], own[name]
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            found += differing(one, two, f"{within}{name}.")
        elif _plain(one) != _plain(two):
            found.append((f"{within}{name}", f"{within}{name}={two} (there {one})"))
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value

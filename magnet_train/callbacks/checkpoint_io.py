"""Checkpoints that are written completely or not at all."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, then moves: a full disk or a kill leaves the previous file intact.

    Lightning's own writes to the system's temporary folder and copies from there, which is not
    atomic if that is another file system.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Saves to a local path; an address such as s3:// is left to Lightning.

        Raises:
            OSError: if the disk is full or not writable; the previous file at `path` stays.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in target.parent.glob(
            ".*.ckpt.part"
        ):  # what a kill has left, as large as a checkpoint
            stale.unlink(missing_ok=True)
        beside = target.with_name(f".{target.name}.part")
        try:
            with beside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, target)
            _sync_folder(target.parent)
        except (OSError, RuntimeError) as error:
            # torch's zip writer may fail again while the first failure unwinds it.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise OSError(cause.errno, cause.strerror, str(target)) from error
        finally:
            beside.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Without it the new name of the file may be lost in a power failure."""
    with suppress(OSError):  # some file systems cannot sync folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

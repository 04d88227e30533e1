"""Checkpoints that are written completely or not at all."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from magnet_train.common.folders import replacing


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
        for stale in target.parent.glob(".*.ckpt.*.part"):  # of a killed process
            stale.unlink(missing_ok=True)
        try:
            with replacing(target, durable=True) as temporary, temporary.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # torch's zip writer may fail again while the first failure unwinds it.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise OSError(cause.errno, cause.strerror, str(target)) from error

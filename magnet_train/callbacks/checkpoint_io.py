"""Atomic writing of checkpoints."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from magnet_train.common.folders import replacing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file next to the target and renames it, so a failure keeps the old file.

    Lightning writes to the system's temporary folder and copies, which is not atomic across file
    systems.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Save to a local path; URLs such as s3:// are handled by Lightning.

        Raises:
            OSError: if the disk is full or not writable; the previous file at `path` is kept.
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
            # torch's zip writer may raise a second error while it handles the first.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise OSError(cause.errno, cause.strerror, str(target)) from error

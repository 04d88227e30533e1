"""The run folder: locked by one run at a time; checkpoints of earlier runs are kept."""

import itertools
import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from magnet_train.common.errors import UserError
from magnet_train.common.folders import check_local, writable_folder
from magnet_train.resume import later_checkpoints, newest_intact_checkpoint

LOCK_WAIT_S = 10.0
"""Data workers of a killed run may hold its lock for a few seconds."""


def prepare_run_folder(config: Any, is_fit: bool) -> Path:
    """Create the run folder, and set the paths that depend on it.

    `--ckpt_path auto` becomes the newest intact checkpoint, or None. A new run in the folder of an
    earlier one moves the old checkpoints to another folder, and a run that resumes from a named
    checkpoint those with more steps, which `auto` would take for its own.

    Args:
        config: options of the verb; changed in place.
        is_fit: whether the verb is `fit`; no other writes checkpoints.

    Returns:
        The folder.

    Raises:
        UserError: if the folder is not writable.
    """
    folder = Path(config.trainer.default_root_dir or "runs/run").expanduser()
    writable_folder(folder, "--trainer.default_root_dir")
    own_checkpoints = folder / "checkpoints"
    checkpoints = Path(config.checkpoint.dirpath or own_checkpoints).expanduser()
    config.trainer.default_root_dir, config.checkpoint.dirpath = str(folder), str(checkpoints)
    named = config.ckpt_path
    if named == "auto":
        newest = newest_intact_checkpoint([folder, checkpoints])
        config.ckpt_path = None if newest is None else str(newest)
        rank_zero_info(f"--ckpt_path auto: {newest or 'no checkpoint yet, starting from scratch'}")
    if not is_fit or config.trainer.fast_dev_run:  # writes no checkpoint
        return folder
    if config.ckpt_path is None:
        _check_overwrites(config, folder)
        if checkpoints == own_checkpoints:
            _move_aside(own_checkpoints)
    elif named != "auto":
        _move_later_aside(checkpoints, Path(named).expanduser())
    writable_folder(checkpoints, "--checkpoint.dirpath")
    return folder


def lock_run(config: Any) -> "list[RunFolderLock]":
    """Create and lock the folders of a run, the checkpoints' too if they are elsewhere.

    Args:
        config: options of `fit`.

    Raises:
        UserError: if one is not writable, or another process uses it.
    """
    locks = []
    for option, folder in _run_folders(config).items():
        writable_folder(folder, option)
        locks.append(RunFolderLock(folder, option))
        locks[-1].acquire()
    return locks


def _run_folders(config: Any) -> dict[str, Path]:
    """The run folder and, if it is elsewhere, the checkpoints' folder, by option."""
    folder = Path(config.trainer.default_root_dir or "runs/run").expanduser()
    checkpoints = Path(config.checkpoint.dirpath or folder).expanduser()
    folders = {"--trainer.default_root_dir": folder}
    if not checkpoints.resolve().is_relative_to(folder.resolve()):
        folders["--checkpoint.dirpath"] = checkpoints
    return folders


class RunFolderLock:
    """Lock on a folder of a run while `fit` runs; held by rank 0."""

    def __init__(self, folder: Path, option: str = "--trainer.default_root_dir"):
        """`option` names the folder, for messages."""
        self.option = option
        self.owner = folder / ".fit_owner.json"
        self._lock = FileLock(folder / ".fit.lock")

    @rank_zero_only
    def acquire(self, wait_s: float | None = None) -> None:
        """
        Args:
            wait_s: Seconds to wait for it; LOCK_WAIT_S by default.

        Raises:
            UserError: if another process uses the folder; the message names it.
        """
        wait_s = LOCK_WAIT_S if wait_s is None else wait_s
        try:
            self._lock.acquire(timeout=wait_s, poll_interval=0.5)
        except Timeout as error:
            owner = self._read_owner()
            raise UserError(
                f"run folder {self.owner.parent}: used by process {owner.get('pid', 'unknown')} on "
                f"{owner.get('host', 'an unknown host')}; wait for it, or choose another "
                f"{self.option}"
            ) from error
        except NotImplementedError:  # a file system without locks
            return
        self.owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")

    @rank_zero_only
    def release(self) -> None:
        """Release the folder."""
        if self._lock.is_locked:
            self.owner.unlink(missing_ok=True)
            self._lock.release()

    def _read_owner(self) -> dict[str, Any]:
        try:
            owner = json.loads(self.owner.read_text())
        except (OSError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}


def check_run_folder(config: Any) -> None:
    """Check whether `fit` would refuse the run folder, without changing it.

    Args:
        config: options of `fit`.

    Raises:
        UserError: if it is a URL, another process trains there, or a new run would overwrite
            checkpoints.
    """
    folders = _run_folders(config)
    own = folders["--trainer.default_root_dir"]
    check_local(own, "--trainer.default_root_dir")
    check_local(Path(config.checkpoint.dirpath or own), "--checkpoint.dirpath")
    for option, folder in folders.items():
        if (folder / ".fit.lock").exists():
            lock = RunFolderLock(folder, option)
            lock.acquire(wait_s=0)
            lock.release()
    if config.ckpt_path is None and not config.trainer.fast_dev_run:
        _check_overwrites(config, own)


def _is_within(path: str | None, folder: Path) -> bool:
    """Whether a path is inside the folder, is the folder, or contains it."""
    if path is None:
        return False
    given = Path(path).resolve()
    folder = folder.resolve()
    return given == folder or given in folder.parents or folder in given.parents


def _check_overwrites(config: Any, folder: Path) -> None:
    own_checkpoints = folder / "checkpoints"
    if _is_within(config.model.init_from, own_checkpoints):
        raise UserError(
            f"--model.init_from {config.model.init_from}: is in the run folder {folder}, which a "
            "new run would overwrite; set --trainer.default_root_dir to another folder"
        )
    dirpath = Path(config.checkpoint.dirpath or own_checkpoints).expanduser()
    if dirpath != own_checkpoints and any(dirpath.glob("*.ckpt")):
        raise UserError(
            f"--checkpoint.dirpath {config.checkpoint.dirpath}: has checkpoints of an earlier run; "
            "give another folder, or --ckpt_path auto to resume that run"
        )


@rank_zero_only
def _move_aside(checkpoints: Path) -> None:
    """Rename an earlier run's checkpoint folder, so that `--ckpt_path auto` does not find it."""
    if not checkpoints.is_dir() or not any(checkpoints.glob("*.ckpt")):
        return
    free = _free_name(checkpoints)
    with suppress(FileNotFoundError):  # without a launcher, one process per node runs this
        checkpoints.rename(free)
    rank_zero_info(f"{checkpoints.parent} has an earlier run; its checkpoints were moved to {free}")


@rank_zero_only
def _move_later_aside(checkpoints: Path, resumed: Path) -> None:
    """Move checkpoints with more steps than the one that a run resumes from to another folder."""
    later = later_checkpoints(checkpoints, resumed)
    if not later:
        return
    free = _free_name(checkpoints)
    free.mkdir(exist_ok=True)
    for path in later:
        with suppress(FileNotFoundError):
            path.rename(free / path.name)
    names = ", ".join(sorted(path.name for path in later))
    rank_zero_info(
        f"{names}: later than {resumed.name}, from which this run resumes; now in {free}"
    )


def _free_name(checkpoints: Path) -> Path:
    names = (checkpoints.with_name(f"{checkpoints.name}-{n}") for n in itertools.count(1))
    return next(name for name in names if not name.exists())

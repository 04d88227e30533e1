"""Checkpoints of a run: the latest, and the best by a metric."""

import errno
import math
import re
import time
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_warn

from magnet_train.callbacks.agreement import ranks_agree
from magnet_train.common.errors import UserError

BEST_NAME = re.compile(r"step=\d+\.ckpt")
SAVE_EVERY_S = 1800.0
"""Maximum number of seconds between checkpoints; validations may be hours apart."""


class RunCheckpoint(Checkpoint):
    """Checkpoints: `last.ckpt` and the best `step=N.ckpt`.

    `last.ckpt` is saved after each validation, every half hour and at the end. After a validation
    it has the weights that were scored.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 1,
        every_n_train_steps: int | None = None,
    ):
        """
        Args:
            dirpath: Folder for checkpoints (default: `checkpoints` in the run folder).
            monitor: Logged metric that defines the best checkpoints, e.g. val/ce; without it, the
                newest are kept.
            mode: Whether a lower (min) or a higher (max) value of the metric is better.
            save_top_k: Number of best checkpoints to keep in addition to last.ckpt; -1 keeps all.
            every_n_train_steps: Optimizer steps between checkpoints, in addition to those after
                validations.
        """
        if mode not in ("min", "max"):
            raise UserError(f"checkpoint.mode={mode}: choose min or max")
        if save_top_k < -1:
            raise UserError(
                f"checkpoint.save_top_k={save_top_k}: must be at least 0, or -1 to keep all"
            )
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise UserError(
                f"checkpoint.every_n_train_steps={every_n_train_steps}: must be at least 1"
            )
        self.dirpath = dirpath
        self.monitor = monitor
        self.mode = mode
        self.save_top_k = save_top_k
        self.every_n_train_steps = every_n_train_steps
        self._scores: dict[str, float] = {}
        """Score by file name, lower is better; names without folders, so that runs can be moved."""
        self._saved_step = 0
        self._saved_at = 0.0

    @property
    def folder(self) -> Path:
        assert self.dirpath is not None  # since setup
        return Path(self.dirpath)

    @property
    def last_model_path(self) -> str:
        """`last.ckpt`, or "" before it is saved or loaded."""
        return str(self.folder / "last.ckpt") if self._saved_step else ""

    @property
    def best_model_path(self) -> str:
        """The best checkpoint that was kept, or ""."""
        return (
            str(self.folder / min(self._scores, key=self._scores.__getitem__))
            if self._scores
            else ""
        )

    @best_model_path.setter
    def best_model_path(self, path: str) -> None:
        """Ignored; Lightning's multi-process launchers set it in the parent, without scores."""

    @property
    def state_key(self) -> str:
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    def state_dict(self) -> dict[str, Any]:
        return {"scores": dict(self._scores)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the scores of files that still exist; the run folder may have been moved.

        Other names than this class writes are ignored: files of replaced scores are removed.
        """
        self._scores = {
            name: float(score)
            for name, score in state_dict["scores"].items()
            if BEST_NAME.fullmatch(name) and (self.folder / name).is_file()
        }

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        if trainer.fast_dev_run or trainer.global_step == self._saved_step:  # type: ignore
            return
        if self.every_n_train_steps and trainer.global_step % self.every_n_train_steps == 0:
            if self.monitor is None:
                self._save_if_best(trainer)
            self.save_last(trainer)
            return
        if not ranks_agree(trainer):
            return
        is_due = trainer.is_global_zero and time.monotonic() - self._saved_at > SAVE_EVERY_S
        if trainer.strategy.reduce_boolean_decision(is_due, all=False):
            self.save_last(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        is_training = trainer.state.fn == "fit" and not trainer.sanity_checking
        if is_training and not trainer.fast_dev_run:  # type: ignore
            self._save_if_best(trainer)
            self.save_last(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last step if no validation did."""
        if trainer.global_step != self._saved_step and not trainer.fast_dev_run:  # type: ignore
            self.save_last(trainer)

    def save_last(self, trainer: L.Trainer) -> None:
        """Save `last.ckpt`. Collective."""
        self._saved_step = trainer.global_step
        _save(trainer, self.folder / "last.ckpt")
        self._saved_at = time.monotonic()

    def _save_if_best(self, trainer: L.Trainer) -> None:
        name = f"step={trainer.global_step:07d}.ckpt"
        score = self._score(trainer)
        if score is None or self.save_top_k == 0 or name in self._scores:
            return
        ranked = sorted({**self._scores, name: score}.items(), key=lambda item: item[1])
        kept = dict(ranked if self.save_top_k == -1 else ranked[: self.save_top_k])
        if not trainer.strategy.reduce_boolean_decision(name in kept):
            return
        replaced = self._scores.keys() - kept.keys()
        self._scores = kept
        _save(trainer, self.folder / name)
        for old in replaced:
            trainer.strategy.remove_checkpoint(self.folder / old)

    def _score(self, trainer: L.Trainer) -> float | None:
        """The monitored metric, with lower = better; None if it was not logged."""
        if self.monitor is None:
            return -float(trainer.global_step)
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            rank_zero_warn(
                f"checkpoint.monitor={self.monitor} was not logged; only last.ckpt is saved"
            )
            return None
        if math.isnan(value):
            return math.inf
        return float(value) if self.mode == "min" else -float(value)


def _save(trainer: L.Trainer, path: Path) -> None:
    """Save a checkpoint. Collective.

    Raises:
        UserError: on every rank, if rank 0 cannot write it.
    """
    problem: str | None = None
    try:
        trainer.save_checkpoint(path, weights_only=False)
    except OSError as error:
        reason = error.strerror or str(error)
        problem = f"{path}: cannot be written ({reason}); resume elsewhere with --ckpt_path FILE"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            problem = f"{path}: the disk is full; free some space and resume with --ckpt_path auto"
        trainer.strategy.barrier()  # the other ranks wait here
    problem = trainer.strategy.broadcast(problem)
    if problem is not None:
        raise UserError(problem)

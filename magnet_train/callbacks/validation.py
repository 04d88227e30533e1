"""Validation every `trainer.val_check_interval` optimizer steps and at the end of a run."""

from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from magnet_train.common.errors import UserError


def check_validation(
    val_check_interval: Any, check_val_every_n_epoch: Any, limit_val_batches: Any
) -> None:
    """Check the trainer's validation settings.

    Training data is endless, so intervals in epochs or shares of them are not defined.

    Args:
        val_check_interval: must be a number of optimizer steps.
        check_val_every_n_epoch: must be None.
        limit_val_batches: must be None or 1.0 for all, or a number of batches per rank.

    Raises:
        UserError: if one of them has another value.
    """
    if check_val_every_n_epoch is not None:
        raise UserError(
            f"trainer.check_val_every_n_epoch={check_val_every_n_epoch}: training data has no "
            "epochs; set it to null, and --trainer.val_check_interval to a number of optimizer "
            "steps"
        )
    if type(val_check_interval) is not int or val_check_interval < 1:
        raise UserError(
            f"trainer.val_check_interval={val_check_interval}: training data has no end; give a "
            "whole number of optimizer steps, at least 1"
        )
    if isinstance(limit_val_batches, float) and limit_val_batches != 1.0:
        raise UserError(
            f"trainer.limit_val_batches={limit_val_batches}: give a whole number of batches per "
            "rank, or remove it"
        )


def check_epoch(limit_train_batches: Any, accumulate_grad_batches: int) -> None:
    """Check that an epoch of `limit_train_batches`, if set, ends with an optimizer step.

    Raises:
        UserError: if it does not, or is not a number of batches.
    """
    is_share = isinstance(limit_train_batches, float) and limit_train_batches != 1.0
    if is_share or (isinstance(limit_train_batches, int) and limit_train_batches < 1):
        raise UserError(
            f"trainer.limit_train_batches={limit_train_batches}: training data has no end; give a "
            "whole number of batches, at least 1"
        )
    if isinstance(limit_train_batches, int) and limit_train_batches % accumulate_grad_batches:
        raise UserError(
            f"trainer.limit_train_batches={limit_train_batches}: must be a multiple of the "
            f"{accumulate_grad_batches} batches accumulated for an optimizer step"
        )


class ValidationSchedule(Callback):
    """Validates every `val_check_interval` optimizer steps, and after the last one.

    Lightning counts batches, so this callback multiplies by the number accumulated. It warns if a
    run has no validation (`limit_val_batches=0`), or if validation does not use every item.
    """

    def __init__(self) -> None:
        self._interval: int | None = None
        """Interval in optimizer steps."""

    def setup(self, trainer: Any, pl_module: L.LightningModule, stage: str) -> None:
        """Runs after the data module's setup, which may set accumulation."""
        if trainer.fast_dev_run or stage not in ("fit", "validate"):
            return
        limit = trainer.limit_val_batches
        if stage == "fit":
            if self._interval is None:
                check_validation(trainer.val_check_interval, trainer.check_val_every_n_epoch, limit)
                self._interval = trainer.val_check_interval
            check_epoch(trainer.limit_train_batches, trainer.accumulate_grad_batches)
            trainer.val_check_interval = self._interval * trainer.accumulate_grad_batches
        if limit == 0:
            rank_zero_warn("this run does not validate: trainer.limit_val_batches=0")
        elif isinstance(limit, int):
            num_items = trainer.datamodule.num_items("validation")
            num_seen = limit * trainer.datamodule.batch_size * trainer.world_size
            if num_seen < num_items:
                rank_zero_warn(
                    f"each validation uses {num_seen} of {num_items} items: "
                    f"trainer.limit_val_batches={limit}"
                )

    def on_train_batch_end(self, trainer: Any, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.limit_val_batches != 0 and is_last_step(trainer):
            trainer.should_stop = True  # Lightning then validates and stops


def is_last_step(trainer: Any) -> bool:
    """Whether the last batch ends the run."""
    if trainer.max_steps >= 0 and trainer.global_step >= trainer.max_steps:
        return True
    is_last_epoch = (
        trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch + 1
    )
    return (
        is_last_epoch and trainer.fit_loop.epoch_loop.batch_idx + 1 >= trainer.num_training_batches
    )

"""Exact resuming: bit-identical to an uninterrupted run on the same ranks."""

from dataclasses import asdict
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from magnet_train.common import private_api
from magnet_train.common.errors import UserError
from magnet_train.conditioning import TextEncoder
from magnet_train.data.shards import ShardSet
from magnet_train.module import MagnetModule
from magnet_train.resume import Layout, shards_hash


class ExactResume(Callback):
    """Saves the data layout in each checkpoint, and corrects the progress after loading one.

    Lightning restores weights, optimizer, schedule and counters. This callback handles the rest:

    - If a checkpoint was saved between two optimizer steps (with accumulation), the accumulated
      gradients are lost, so the batches since the last step are repeated.
    - If it was saved just before a validation, Lightning would skip that validation.
    - With another number of ranks or batch size, a batch count means other examples, so it is
      converted, and a message says that results will not be bit-identical.
    """

    def __init__(self) -> None:
        self._open_batches = 0
        """Batches since the last optimizer step."""
        self._has_skipped = False
        """Whether this rank skipped shards."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *args: Any
    ) -> None:
        self._has_skipped |= bool(batch["shards_skipped"] or batch["items_skipped"])

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Any
    ) -> None:
        self._open_batches += 1

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        self._open_batches = 0

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(pl_module, MagnetModule)
        checkpoint["run"] = {
            "layout": asdict(_layout(trainer)),
            "open_batches": self._open_batches,
            "has_skipped": trainer.strategy.reduce_boolean_decision(self._has_skipped, all=False),
            "train": shards_hash(data.shards("train").index),
            "validation": _validation_hash(data),
            "codec": data.shards("train").index["codec"]["hash"],
            "text_encoder": pl_module.text_encoder.hash,
        }

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Correct the progress.

        Raises:
            UserError: if the checkpoint was trained on other shards, or with another codec or text
            encoder.
        """
        saved = checkpoint.get("run")
        if trainer.state.fn != "fit" or saved is None:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(pl_module, MagnetModule)
        check_data(data.shards("train"), saved, pl_module.text_encoder)
        if saved["validation"] != _validation_hash(data):
            rank_zero_info(
                "another validation set than before: metrics under val/ do not compare with "
                "earlier ones"
            )
        self._has_skipped = saved["has_skipped"]
        if self._has_skipped:
            rank_zero_info(
                "shards were skipped before this checkpoint was saved: results are bit-identical "
                "to a run without the interruption only if the same shards are still unreadable"
            )
        progress = private_api.Progress(checkpoint)
        # Otherwise Lightning would treat a validation that ran late as interrupted at each resume.
        progress.set_validation(0)
        was_at_batch_end = not saved["open_batches"] and progress.is_at_batch_end()
        if saved["open_batches"]:
            progress.move_to_batch_end(progress.num_batches - saved["open_batches"])
            progress.take_back_logged_step()
        self._convert(progress, Layout(**saved["layout"]), _layout(trainer))
        if was_at_batch_end and _validation_is_due(trainer, progress.num_batches):
            progress.complete_batch()
            progress.set_validation(1)  # as if saved during the first batch of that validation

    @staticmethod
    def _convert(progress: private_api.Progress, before: Layout, now: Layout) -> None:
        if before == now:
            return
        done = progress.num_batches
        batches = now.batches(done, before)
        progress.move_to_batch_end(batches)
        rank_zero_info(
            f"layout changed from {before} to {now}: resuming at example "
            f"{batches * now.ranks * now.batch_size} of {done * before.ranks * before.batch_size}; "
            "results will not be bit-identical"
        )


def _layout(trainer: L.Trainer) -> Layout:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    workers = data.workers_per_rank(trainer.world_size)
    return Layout(trainer.world_size, data.batch_size, trainer.accumulate_grad_batches, workers)


def _validation_is_due(trainer: Any, num_batches: int) -> bool:
    return trainer.limit_val_batches != 0 and num_batches % trainer.val_check_interval == 0


def check_data(found: ShardSet, saved: dict[str, Any], text_encoder: TextEncoder | None) -> None:
    """Checks that training shards and text encoder are those of a checkpoint.

    Args:
        found: training shards.
        saved: the checkpoint's `run`.
        text_encoder: None if it is not available.

    Raises:
        UserError: if they, or the shards' codec, differ.
    """
    if text_encoder is not None and saved["text_encoder"] != text_encoder.hash:
        raise UserError(
            f"--ckpt_path: trained with another text encoder than {text_encoder.id}; set "
            "--model.text_encoder as in the run's config.yaml, or start a new run"
        )
    if saved["codec"] != found.index["codec"]["hash"]:
        raise UserError(
            f"--ckpt_path: trained on codes of codec {saved['codec']}, but {found.name} has those "
            f"of {found.index['codec']['hash']}; give the shards it was trained on, or start a new "
            "run"
        )
    if saved["train"] != shards_hash(found.index):
        raise UserError(
            f"--ckpt_path: trained on other shards than those of {found.name}; give those it was "
            "trained on, or start a new run from its weights with --model.init_from CHECKPOINT"
        )


def _validation_hash(data: Any) -> str | None:
    return (
        None if data.folders["validation"] is None else shards_hash(data.shards("validation").index)
    )

"""A resumed run goes on as the one that was interrupted would have, bit for bit on the same ranks."""

from dataclasses import asdict
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from magnet_train.common import private_api
from magnet_train.common.errors import UserError
from magnet_train.conditioning import TextEncoder
from magnet_train.module import MagnetModule
from magnet_train.resume import Layout, fingerprint


class ExactResume(Callback):
    """Notes in each checkpoint what its progress means, and sets the progress right when one is loaded.

    Lightning restores weights, optimizer, schedule and counters. Three things it leaves open:

    - Saved between two optimizer steps (time-based saving with accumulation), the gradients so far are lost; so the
      batches since the last step are done again, on the weights that they were done on.
    - Saved at the end of a batch after which validation is due, it would go on without that validation.
    - On another number of ranks, or with another batch size, as many batches would be other examples; so they are
      counted anew, and a line says what is no longer equal.
    """

    def __init__(self) -> None:
        self._open = 0
        """Batches since the last optimizer step."""
        self._has_skipped = False

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *args: Any) -> None:
        self._has_skipped |= bool(batch["shards_left_out"] or batch["items_left_out"])

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Any) -> None:
        self._open += 1

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self._open = 0

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(pl_module, MagnetModule)
        checkpoint["run"] = {
            "layout": asdict(self._layout(trainer)),
            "open_batches": self._open,
            "has_skipped": trainer.strategy.reduce_boolean_decision(self._has_skipped, all=False),
            "train": fingerprint(data.shards("train").index),
            "validation": _validation_fingerprint(data),
            "codec": data.shards("train").index["codec"]["hash"],
            "text_encoder": pl_module.text_encoder.stamp,
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Sets the progress right.

        Raises:
            UserError: if the checkpoint was trained on other shards, another codec or another text encoder.
        """
        if trainer.state.fn != "fit" or (saved := checkpoint.get("run")) is None:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(pl_module, MagnetModule)
        self.check_data(data, saved, pl_module.text_encoder)
        if saved.get("validation", now := _validation_fingerprint(data)) != now:
            rank_zero_info(
                "goes on with another validation set: earlier figures under val/ do not compare with new ones"
            )
        self._has_skipped = saved.get("has_skipped", False)
        if self._has_skipped:
            rank_zero_info(
                "shards or items were skipped before this checkpoint was saved: what follows comes in another order "
                "than without the interruption, so results will not be bit-identical"
            )
        saved_progress = private_api.Progress(checkpoint)
        progress = saved_progress.training
        # Or a validation that was made up for once would look interrupted ever after.
        of_validation = saved_progress.validation
        for counts in (of_validation["total"], of_validation["current"]):
            counts |= dict.fromkeys(("ready", "started", "processed", "completed"), 0)
        was_at_end = not saved["open_batches"] and _is_at_batch_end(progress)
        if saved["open_batches"]:
            _end_batch(progress, -saved["open_batches"])
            saved_progress.take_back_logged_step()
        before, now = Layout(**saved["layout"]), self._layout(trainer)
        if before != now:
            done = progress["total"]["processed"]
            batches = now.batches(done, before)
            _end_batch(progress, batches - done)
            examples = [n * lay.ranks * lay.batch_size for n, lay in ((batches, now), (done, before))]
            rank_zero_info(
                f"resumed on {now}; saved on {before}: goes on after example {examples[0]} of {examples[1]}; order of "
                "the data, masks and rounding are no longer bit-equal to a run without the change"
            )
        # By the counts of this layout, in whose batches the interval is.
        if was_at_end and self._validation_is_due(trainer, progress["total"]["processed"]):
            for counts in (progress["total"], progress["current"]):
                counts["completed"] = counts["processed"]
            # As if saved while the first batch of that validation was under way.
            for counts in (of_validation["total"], of_validation["current"]):
                counts |= {"ready": 1, "started": 1}

    @staticmethod
    def _layout(trainer: L.Trainer) -> Layout:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        workers = data.workers_per_rank(trainer.world_size)
        return Layout(trainer.world_size, data.batch_size, trainer.accumulate_grad_batches, workers)

    @staticmethod
    def _validation_is_due(trainer: Any, num_batches: int) -> bool:
        return trainer.limit_val_batches != 0 and num_batches % trainer.val_check_interval == 0

    @staticmethod
    def check_data(data: Any, saved: dict[str, Any], text_encoder: TextEncoder | None) -> None:
        """Whether training shards and text encoder, if it could be had, are those that a checkpoint's `run` notes.

        Raises:
            UserError: if they, or the shards' codec, are others.
        """
        stamp = saved.get("text_encoder")  # an older version noted none
        if text_encoder is not None and stamp not in (None, text_encoder.stamp):
            raise UserError(
                f"--ckpt_path: trained with another text encoder than {text_encoder.id}; give --model.text_encoder as "
                "the run's config.yaml has it, or begin a new run"
            )
        found = data.shards("train")
        if saved["codec"] != found.index["codec"]["hash"]:
            raise UserError(
                f"--ckpt_path: trained on codes of codec {saved['codec']}, but {found.name} holds those of "
                f"{found.index['codec']['hash']}; give the shards it was trained on, or begin a new run"
            )
        if saved["train"] != fingerprint(found.index):
            raise UserError(
                f"--ckpt_path: trained on other shards than {found.name} holds; give those it was trained on, or "
                "train on with --model.init_from CHECKPOINT instead, which begins a new run with its weights"
            )


def _validation_fingerprint(data: Any) -> str | None:
    return None if data.folders["validation"] is None else fingerprint(data.shards("validation").index)


def _is_at_batch_end(progress: dict[str, Any]) -> bool:
    """Whether it was saved at the end of a batch; afterwards, in a validation for one, the batch is completed."""
    return progress["total"]["completed"] == progress["total"]["processed"] - 1


def _end_batch(progress: dict[str, Any], more: int) -> None:
    """Counters as if saved at the end of the batch that is `more` batches on."""
    for counts in (progress["total"], progress["current"]):
        done = max(0, counts["processed"] + more)
        counts |= {"ready": done, "started": done, "processed": done, "completed": max(0, done - 1)}
    progress["is_last_batch"] = False

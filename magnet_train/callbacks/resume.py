"""A resumed run goes on as the one that was interrupted would have, bit for bit on the same ranks."""

from dataclasses import asdict
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from magnet_train.common.errors import UserError
from magnet_train.conditioning import TextEncoder
from magnet_train.module import MagnetModule
from magnet_train.resume import Layout, fingerprint

PROGRESS = "epoch_loop.batch_progress"


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
        loops = checkpoint["loops"]["fit_loop"]
        progress, inner = loops[PROGRESS], loops["epoch_loop.state_dict"]
        # Or a validation that was made up for once would look interrupted ever after.
        of_validation = loops["epoch_loop.val_loop.batch_progress"]
        for counts in (of_validation["total"], of_validation["current"]):
            counts |= dict.fromkeys(("ready", "started", "processed", "completed"), 0)
        was_at_end = not saved["open_batches"] and _is_at_batch_end(progress)
        if saved["open_batches"]:
            _end_batch(progress, -saved["open_batches"])
            inner["_batches_that_stepped"] -= 1
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
        if was_at_end and validation_is_due(
            trainer, progress["total"]["processed"], progress["current"]["processed"], checkpoint["epoch"]
        ):
            for counts in (progress["total"], progress["current"]):
                counts["completed"] = counts["processed"]
            # As if saved while the first batch of that validation was under way.
            for counts in (of_validation["total"], of_validation["current"]):
                counts |= {"ready": 1, "started": 1}

    @staticmethod
    def _layout(trainer: L.Trainer) -> Layout:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        return Layout(trainer.world_size, data.batch_size, trainer.accumulate_grad_batches, data.workers)

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


def validation_is_due(trainer: L.Trainer, total: int, current: int, epoch: int) -> bool:
    """Whether a validation follows on a batch.

    Args:
        trainer: with its intervals; those in seconds say nothing of batches.
        total: batches done in the run.
        current: batches done in the epoch.
        epoch: number of the epoch, from 0.
    """
    interval, every_epochs = trainer.val_check_interval, trainer.check_val_every_n_epoch  # type: ignore[attr-defined]
    if trainer.limit_val_batches == 0:
        return False
    if every_epochs is None:
        return isinstance(interval, int) and total % interval == 0
    batches = interval if isinstance(interval, int) else trainer.limit_train_batches  # the stream has no end of its own
    return (epoch + 1) % every_epochs == 0 and isinstance(batches, int) and current % batches == 0

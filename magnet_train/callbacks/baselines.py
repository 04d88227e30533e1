"""Baselines of the validation's cross-entropy: tables of counts over the training codes."""

from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from magnet_train.common.errors import UserError
from magnet_train.data.pipeline import Batch
from magnet_train.metrics.baselines import CountTables
from magnet_train.metrics.distributed import all_gather_list


class CountBaselines(Callback):
    """Logs val/ce of the unigram and bigram baselines.

    The counts are from the training shards. They are scored in the first validation, on all frames
    of its items; later validations log the same values again, so that charts show a line.
    """

    def __init__(self) -> None:
        self._values: dict[str, dict[str, float]] = {}
        """Figures of each split."""
        self._tables: CountTables | None = None
        self._sums: Tensor | None = None
        """Losses of unigram and bigram in each codebook, and frames: float64 `3 k`."""

    def _split(self, trainer: L.Trainer) -> str:
        return "test" if trainer.testing else "validation"

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._sums = None
        if trainer.sanity_checking or self._split(trainer) in self._values:
            return
        try:
            self._tables = trainer.datamodule.count_tables()  # type: ignore[attr-defined]
        except UserError as error:
            rank_zero_warn(f"no baselines of val/ce: {error}")

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._tables is None:
            return
        codes, valid = batch["codes"].cpu(), batch["valid"].cpu()[:, None]
        losses = (self._tables.unigram_losses(codes), self._tables.bigram_losses(codes))
        rows = [loss.masked_fill(~valid, 0).sum((0, 2)) for loss in losses]
        rows.append(valid.sum().double().expand_as(rows[0]))
        sums = torch.stack(rows)
        self._sums = sums if self._sums is None else self._sums + sums

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        split = self._split(trainer)
        parts = all_gather_list([] if self._sums is None else [self._sums])
        self._tables = self._sums = None
        if parts:
            unigram, bigram, frames = torch.stack(parts).sum(0)
            self._values[split] = _named(unigram / frames, "unigram") | _named(
                bigram / frames, "bigram"
            )
        if split in self._values:
            pl_module.log_dict(self._values[split], sync_dist=False)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end


def _named(losses: Tensor, baseline: str) -> dict[str, float]:
    stages = {
        f"val/ce/stage{k}/baseline_{baseline}": loss for k, loss in enumerate(losses.tolist())
    }
    return {f"val/ce/baseline_{baseline}": losses.mean().item(), **stages}

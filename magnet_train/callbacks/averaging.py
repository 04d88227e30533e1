"""Averaged weights: what validation sees and checkpoints hold, with the reference's bias correction."""

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from magnet_train.common.errors import UserError
from magnet_train.sharding import own_part, whole_on_first


class WeightEMA(Callback):
    """Exponential average of the weights, on which validation runs and which checkpoints hold as `state_dict`.

    The raw weights stand beside it as `current_model_state`, the number of updates as `averaging_state`. The average
    is corrected for its start (audiocraft `optim/ema.py`): the n-th update weighs 1 / (1 + d + … + d^n), so that the
    random initial weights are gone at once instead of lingering for a thousand steps.

    It lies where the weights lie, and as they are sharded: each rank averages its own part. Lightning's own callback,
    whose names in checkpoints these are, refuses shards, and averages on the CPU what is trained on a GPU.
    """

    def __init__(self, decay: float = 0.99, every_n_steps: int = 10):
        """Sets how far the average looks back.

        Args:
            decay: weight of the past at each update, 0 to 1; 0.99 every 10 steps looks back a thousand steps.
            every_n_steps: optimizer steps between updates.
        """
        if not 0 <= decay < 1 or every_n_steps < 1:
            raise UserError(f"averaging: decay={decay} must be in [0, 1), every_n_steps={every_n_steps} at least 1")
        self.decay, self.every_n_steps = decay, every_n_steps
        self._average: dict[str, Tensor] = {}
        self._num_updates = torch.tensor(0)
        self._latest_update_step = 0

    def updated(self, average: Tensor, current: Tensor, num_updates: Tensor | int) -> Tensor:
        """The average after one more update; `num_updates` came before."""
        return average + (current - average) * ((1 - self.decay) / (1 - self.decay ** (num_updates + 1)))

    def is_due(self, step: int) -> bool:
        """Whether the average is updated after that many optimizer steps."""
        return step % self.every_n_steps == 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._average:
            self._average = _copies(pl_module)
        for name, parameter in pl_module.named_parameters():  # a checkpoint may have been loaded before the device
            self._average[name] = self._average[name].to(parameter.device)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._latest_update_step or not self.is_due(trainer.global_step):
            return
        for average, current in self._pairs(pl_module):
            average.copy_(self.updated(average, current, self._num_updates) if self._num_updates else current)
        self._num_updates += 1
        self._latest_update_step = trainer.global_step

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap(pl_module)

    @torch.no_grad()
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The module goes on with the average."""
        for average, current in self._pairs(pl_module):
            current.copy_(average)

    def state_dict(self) -> dict[str, Any]:
        return {"latest_update_step": self._latest_update_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._latest_update_step = state_dict["latest_update_step"]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average:
            checkpoint["current_model_state"] = checkpoint["state_dict"]
            checkpoint["state_dict"] = whole_on_first(self._average)
            checkpoint["averaging_state"] = {"n_averaged": self._num_updates}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """By now the module has the average, as `state_dict`."""
        if trainer.state.fn != "fit":
            return
        self._average = _copies(pl_module)
        if "current_model_state" not in checkpoint:
            rank_zero_warn("the checkpoint holds no average: it begins with the checkpoint's weights")
            return
        self._num_updates = checkpoint["averaging_state"]["n_averaged"].clone()
        set_model_state_dict(
            pl_module, checkpoint["current_model_state"], options=StateDictOptions(full_state_dict=True)
        )

    def _pairs(self, module: L.LightningModule) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's part of each average and of its weight, in the weights' own memory."""
        if self._average:
            for name, parameter in module.named_parameters():
                yield own_part(self._average[name]), own_part(parameter.detach())

    @torch.no_grad()
    def _swap(self, module: L.LightningModule) -> None:
        for average, current in self._pairs(module):
            kept = average.clone()
            average.copy_(current)
            current.copy_(kept)


def _copies(module: L.LightningModule) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

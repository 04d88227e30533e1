"""Exponential moving average of the weights, with the bias correction of audiocraft."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from magnet_train.common.ranges import check_values
from magnet_train.module import trainable_parameters
from magnet_train.sharding import gather_to_rank0, local_shard


class WeightEMA(Callback):
    """Exponential moving average (EMA) of the weights, used by validation and checkpoints.

    A checkpoint's `state_dict` has the average, `current_model_state` the raw weights, and
    `averaging_state` the number of updates. The average is bias-corrected (audiocraft
    `optim/ema.py`): the n-th update has the weight 1 / (1 + d + … + d^n), so that the random
    initial weights have no influence after the first update.

    The average is on the same device as the weights and sharded in the same way. Lightning's own
    callback, whose checkpoint names are used here, does not support sharded weights, and averages
    on the CPU when training on a GPU.
    """

    def __init__(self, decay: float = 0.99, every_n_steps: int = 10):
        """
        Args:
            decay: EMA decay, 0 to 1; 0.99 every 10 steps averages over about 1,000 steps.
            every_n_steps: Optimizer steps between updates of the average.
        """
        self.decay = decay
        self.every_n_steps = every_n_steps
        check_values(self, "averaging: ", decay="[0, 1)", every_n_steps="[1, inf)")
        self._average: dict[str, Tensor] = {}
        """Average by name; holds the raw weights while the module has the average."""
        self._num_updates = torch.tensor(0)
        self._latest_update_step = 0
        self._is_swapped = False
        self._validation = ExitStack()

    def updated(self, average: Tensor, current: Tensor, num_updates: Tensor | int) -> Tensor:
        """The average after another update, following `num_updates` earlier ones."""
        return average + (current - average) * (
            (1 - self.decay) / (1 - self.decay ** (num_updates + 1))
        )

    def is_due(self, step: int) -> bool:
        """Whether the average is updated after that many optimizer steps."""
        return step % self.every_n_steps == 0

    @contextmanager
    def averaged(self, module: L.LightningModule) -> Iterator[None]:
        """Context in which the module has the averaged weights, if there are any yet."""
        self._swap(module)
        self._is_swapped = True
        try:
            yield
        finally:
            self._swap(module)
            self._is_swapped = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._average:
            self._average = _copies(pl_module)
        # A checkpoint was loaded before the module was moved to its device.
        for name, parameter in trainable_parameters(pl_module).items():
            self._average[name] = self._average[name].to(parameter.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        self._update_if_due(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Runs before all epoch hooks, which may use the weights."""
        self._validation.enter_context(self.averaged(pl_module))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation.close()

    @torch.no_grad()
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The module keeps the average; the last checkpoint is already saved."""
        for average, current in self._pairs(pl_module):
            current.copy_(average)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not self._average:
            return
        self._update_if_due(trainer, pl_module)  # another callback may save before our batch hook
        in_module = checkpoint["state_dict"]
        held_here = in_module | gather_to_rank0(self._average)
        raw, average = (held_here, in_module) if self._is_swapped else (in_module, held_here)
        checkpoint["current_model_state"] = raw
        checkpoint["state_dict"] = average
        checkpoint["averaging_state"] = {
            "n_averaged": self._num_updates,
            "latest_update_step": self._latest_update_step,
        }

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The module already has the average, loaded from `state_dict`."""
        if trainer.state.fn != "fit":
            return
        self._average = _copies(pl_module)
        if "current_model_state" not in checkpoint:
            rank_zero_warn(
                "the checkpoint has no averaged weights: the average starts with the checkpoint's "
                "weights"
            )
            return
        state = checkpoint["averaging_state"]
        self._num_updates = state["n_averaged"].clone()
        self._latest_update_step = state["latest_update_step"]
        from torch.distributed.checkpoint.state_dict import (  # with all of FSDP
            StateDictOptions,
            set_model_state_dict,
        )

        set_model_state_dict(
            pl_module,
            checkpoint["current_model_state"],
            options=StateDictOptions(full_state_dict=True, strict=pl_module.strict_loading),
        )

    @torch.no_grad()
    def _update_if_due(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step = trainer.global_step
        if self._is_swapped or step == self._latest_update_step or not self.is_due(step):
            return
        for average, current in self._pairs(module):
            average.copy_(
                self.updated(average, current, self._num_updates) if self._num_updates else current
            )
        self._num_updates += 1
        self._latest_update_step = step

    def _pairs(self, module: L.LightningModule) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of this rank's shards of average and weight, as views."""
        if self._average:
            for name, parameter in trainable_parameters(module).items():
                yield local_shard(self._average[name]), local_shard(parameter.detach())

    @torch.no_grad()
    def _swap(self, module: L.LightningModule) -> None:
        for average, current in self._pairs(module):
            kept = average.clone()
            average.copy_(current)
            current.copy_(kept)


def _copies(module: L.LightningModule) -> dict[str, Tensor]:
    return {
        name: parameter.detach().clone() for name, parameter in trainable_parameters(module).items()
    }

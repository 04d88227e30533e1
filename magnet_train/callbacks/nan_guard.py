"""Skips steps whose loss or gradients are not finite, and names their items."""

import warnings
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from magnet_train.common.errors import UserError
from magnet_train.common.ranges import check_values
from magnet_train.module import trainable_parameters
from magnet_train.sharding import full_tensor


class NanGuard(Callback):
    """NaN guard: skip steps whose loss or gradients are not finite.

    A skipped step changes neither weights nor optimizer state on any rank, but counts for schedule
    and averaging. `train/steps_skipped` counts skipped steps. Many in a row end the run. In
    16-mixed precision the gradient scaler causes such steps while it searches for its scale, so
    there they are reported, and end the run, only if the scale is 1.
    """

    def __init__(self, max_consecutive: int = 10):
        """
        Args:
            max_consecutive: Abort after this many consecutive skipped (non-finite) steps.
        """
        self.max_consecutive = max_consecutive
        check_values(self, "nan_guard: ", max_consecutive="[1, inf)")
        self.skipped = 0
        self.consecutive = 0
        self._keys: list[str] = []
        self._losses: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "consecutive": self.consecutive}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]
        self.consecutive = state_dict["consecutive"]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *args: Any
    ) -> None:
        self._keys.append(", ".join(batch["keys"]))

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Remove the gradients of a bad step, so that the optimizer skips all parameters.

        Raises:
            UserError: after too many bad steps in a row.
        """
        keys = self._keys
        losses = torch.stack(self._losses)
        self._keys = []
        self._losses = []
        parameters = trainable_parameters(pl_module).values()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        is_finite = losses.isfinite().all() & full_tensor(norm).isfinite()
        all_ranks = trainer.strategy.reduce_boolean_decision
        if all_ranks(bool(is_finite)):
            self.consecutive = 0
            return
        self.skipped += 1
        self.consecutive += 1
        pl_module.log("train/steps_skipped", float(self.skipped))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if (
            scaler is not None
            and all_ranks(bool(losses.isfinite().all()))
            and scaler.get_scale() > 1
        ):
            return  # the scaler skips the step itself and halves its scale
        self._warn(trainer, keys, losses.tolist())
        for parameter in parameters:
            parameter.grad = None
        if self.consecutive >= self.max_consecutive:
            raise UserError(
                f"{self.consecutive} steps in a row without a finite loss and gradients, the last "
                f"is step {trainer.global_step}: the last checkpoint is good; resume from it with "
                "--ckpt_path auto and a lower --model.optimizer.lr or --trainer.precision "
                "bf16-mixed, or check the items named above"
            )

    def _warn(self, trainer: L.Trainer, keys: list[str], losses: list[float]) -> None:
        bad = [(k, x) for k, x in zip(keys, losses, strict=True) if not torch.tensor(x).isfinite()]
        what = "; ".join(f"loss {loss} of {items}" for items, loss in bad)
        if not bad:
            items = "; ".join(keys)
            what = f"gradients that are not finite, here or on another rank; the items were {items}"
        warnings.warn(
            f"step {trainer.global_step} skipped, rank {trainer.global_rank}: {what}", stacklevel=1
        )

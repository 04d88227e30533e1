"""Steps whose loss or gradients are not finite are left out, counted, and named by their items."""

import warnings
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from magnet_train.common.errors import UserError
from magnet_train.sharding import full_tensor


class FiniteGuard(Callback):
    """Leaves out optimizer steps on a loss or on gradients that are not finite, and ends the run after many in a row.

    A step that is left out changes neither weights nor the optimizer's state, on any rank; it counts as a step for
    schedule and averaging. `train/steps_left_out` counts them. In 16-mixed precision gradients that are not finite are
    how the scaler finds its scale, so there these steps are counted too, but named, and a reason to end, only once the
    scale is down to 1.
    """

    def __init__(self, most_in_a_row: int = 10):
        """When to give up.

        Args:
            most_in_a_row: steps left out one after another at which the run ends.
        """
        if most_in_a_row < 1:
            raise UserError(f"finite: most_in_a_row={most_in_a_row} must be at least 1")
        self.most_in_a_row = most_in_a_row
        self.left_out = 0
        self.in_a_row = 0
        self._keys: list[str] = []
        self._losses: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        return {"left_out": self.left_out, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.left_out, self.in_a_row = state_dict["left_out"], state_dict["in_a_row"]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._keys.append(", ".join(batch["keys"]))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Drops the gradients of a bad step: the optimizer passes over a parameter that has none.

        Raises:
            UserError: after too many in a row.
        """
        keys, losses = self._keys, torch.stack(self._losses)
        self._keys, self._losses = [], []
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        is_finite = losses.isfinite().all() & full_tensor(torch.nn.utils.get_total_norm(gradients)).isfinite()
        agree = trainer.strategy.reduce_boolean_decision
        if agree(bool(is_finite)):
            self.in_a_row = 0
            return
        self.left_out += 1
        self.in_a_row += 1
        pl_module.log("train/steps_left_out", float(self.left_out))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and agree(bool(losses.isfinite().all())) and scaler.get_scale() > 1:
            return  # it leaves the step out itself, and tries the next one at half the scale
        self._name(trainer, keys, losses.tolist())
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        if self.in_a_row >= self.most_in_a_row:
            raise UserError(
                f"{self.in_a_row} steps in a row without a finite loss and gradients, the last step "
                f"{trainer.global_step}: the last checkpoint is good; go on from it with a lower --model.optimizer.lr "
                "or --trainer.precision bf16-mixed, or look at the items named above"
            )

    def _name(self, trainer: L.Trainer, keys: list[str], losses: list[float]) -> None:
        bad = [(k, x) for k, x in zip(keys, losses, strict=True) if not torch.tensor(x).isfinite()]
        what = "; ".join(f"loss {loss} of {items}" for items, loss in bad)
        if not bad:
            what = f"gradients that are not finite, here or on another rank; the items were {'; '.join(keys)}"
        warnings.warn(f"step {trainer.global_step} left out, rank {trainer.global_rank}: {what}", stacklevel=1)

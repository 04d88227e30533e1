"""Skips steps whose loss or gradients are not finite, and names their items."""

import warnings
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from magnet_train.common.errors import UserError
from magnet_train.common.ranges import check_values
from magnet_train.module import is_logged, trainable_parameters
from magnet_train.sharding import full_tensor


@dataclass(frozen=True)
class Step:
    """An optimizer step whose outcome the host has not read yet."""

    number: int
    rank: int
    keys: list[str]
    """Items of each batch."""
    losses: Tensor
    """Loss of each batch that was accumulated in the step."""
    found_inf: Tensor
    """0, or 1 if a loss or gradient of any rank is not finite."""


class NanGuard(Callback):
    """NaN guard: skip steps whose loss or gradients are not finite.

    A skipped step changes neither weights nor optimizer state on any rank, but counts for schedule
    and averaging. `train/steps_skipped` counts skipped steps. Many in a row end the run. The device
    decides which steps are skipped. The host reads its decisions every `trainer.log_every_n_steps`
    and before a checkpoint, so warnings and the end of a run may come some steps late. In 16-mixed
    precision the gradient scaler causes such steps while it searches for its scale, so they are
    reported, and end the run, only if the scale is 1.
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
        self._logged = 0
        """Skipped steps up to the last row."""
        self._failed: int | None = None
        """Number of the step at which the run has to end."""
        self._keys: list[str] = []
        self._losses: list[Tensor] = []
        self._steps: list[Step] = []

    def state_dict(self) -> dict[str, Any]:
        self._read_outcomes()
        return {"skipped": self.skipped, "consecutive": self.consecutive}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = self._logged = int(state_dict["skipped"])
        self.consecutive = int(state_dict["consecutive"])

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
        """Let the optimizer skip a bad step."""
        parameters = trainable_parameters(pl_module).values()
        losses = torch.stack(self._losses)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        is_finite = losses.isfinite().all() & full_tensor(norm).isfinite()
        found_inf = (~is_finite).float()
        if dist.is_initialized():
            dist.all_reduce(found_inf, dist.ReduceOp.MAX)
        self._steps.append(
            Step(trainer.global_step, trainer.global_rank, self._keys, losses, found_inf)
        )
        self._keys = []
        self._losses = []
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is None:
            optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        elif found_inf:
            # The scaler waits for the device anyway; it skips the step itself and halves its scale.
            all_ranks = trainer.strategy.reduce_boolean_decision
            searches = all_ranks(bool(losses.isfinite().all())) and scaler.get_scale() > 1
            self._read_outcomes(searches)
            if not searches:
                for parameter in parameters:
                    parameter.grad = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Read the outcomes before a row is written.

        Raises:
            UserError: after too many bad steps in a row.
        """
        if is_logged(trainer, trainer.global_step):
            self._read_outcomes()
            if self.skipped > self._logged:
                pl_module.log("train/steps_skipped", float(self.skipped))
                self._logged = self.skipped
        self._end_if_failed()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._read_outcomes()
        self._end_if_failed()

    def _read_outcomes(self, searches: bool = False) -> None:
        """Read the outcomes, count and report skipped steps; waits for the device.

        Args:
            searches: Whether the scaler still searches for its scale.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return
        found = torch.stack([step.found_inf for step in steps]).tolist()
        for step, is_skipped in zip(steps, found, strict=True):
            self.consecutive = self.consecutive + 1 if is_skipped else 0
            if not is_skipped:
                continue
            self.skipped += 1
            if not searches:
                _warn(step)
                if self.consecutive >= self.max_consecutive:
                    self._failed = step.number

    def _end_if_failed(self) -> None:
        if self._failed is not None:
            raise UserError(
                f"{self.max_consecutive} steps in a row without a finite loss and gradients, the "
                f"last is step {self._failed}: the last checkpoint is good; resume from it with "
                "--ckpt_path auto and a lower --model.optimizer.lr or --trainer.precision "
                "bf16-mixed, or check the items named above"
            )


def _warn(step: Step) -> None:
    losses = step.losses.tolist()
    finite = step.losses.isfinite().tolist()
    bad = [
        f"loss {loss} of {items}"
        for items, loss, is_finite in zip(step.keys, losses, finite, strict=True)
        if not is_finite
    ]
    what = "; ".join(bad)
    if not bad:
        items = "; ".join(step.keys)
        what = f"gradients that are not finite, here or on another rank; the items were {items}"
    warnings.warn(f"step {step.number} skipped, rank {step.rank}: {what}", stacklevel=1)

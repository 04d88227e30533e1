"""Prints one line for each phase of `fit`, with its expected time."""

import time
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Callback

from magnet_train.common.progress import readable_time

WARM_UP, MEASURED = 3, 10
"""Optimizer steps before the measurement, and of the measurement."""


def crop_seconds(
    start: int, end: int, schedule: Sequence[tuple[float, int]], crop_s: float
) -> float:
    """Sum of the crop lengths of the steps from `start` to `end`; their time is roughly
    proportional to it.

    Args:
        start: first step.
        end: the step after the last one.
        schedule: crop lengths in seconds and numbers of steps at the beginning of the run.
        crop_s: crop length afterwards.

    >>> crop_seconds(1, 10, [(2.5, 2), (5.0, 3)], crop_s=10.0)
    67.5
    """
    total, first = 0.0, 0
    for length, steps in [*schedule, (crop_s, max(end, 1))]:
        total += length * max(0, min(end, first + steps) - max(start, first))
        first += steps
    return total


class Phases(Callback):
    """Prints when validation and training begin, with their expected time.

    Training time is extrapolated from its first steps, validation time is that of the previous one.
    """

    def __init__(self) -> None:
        self._measured_from: tuple[int, float] | None = None
        """First step of the measurement, and its time."""
        self._next = 0
        """Step at which the measurement begins."""
        self._is_reported = False
        self._validation_since = 0.0
        self._validation_s: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._next = trainer.global_step + WARM_UP

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        step, now = trainer.global_step, time.monotonic()
        if self._is_reported or step < self._next:
            return
        if self._measured_from is None:
            self._measured_from = step, now
            return
        first, since = self._measured_from
        if step - first >= MEASURED:
            self._is_reported = True
            self._report_training(trainer, step, first, now - since)

    def _report_training(self, trainer: L.Trainer, step: int, first: int, seconds: float) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        crops = data.crop_schedule, data.crop_s
        per_second = seconds / crop_seconds(first, step, *crops)
        text = f"{seconds / (step - first):.2g} s each"
        total = trainer.estimated_stepping_batches
        if total != float("inf"):
            rest = per_second * crop_seconds(step, int(total), *crops)
            text = f"of {int(total)}, {text}; about {readable_time(rest)} without validations"
        self._print(trainer, f"training    step {step} {text}")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation_since = time.monotonic()
        # A validation restarts the measurement of training.
        self._measured_from, self._next = None, trainer.global_step + 1
        # A finished run that is started again only validates, outside of training.
        is_before = trainer.state.fn != "fit" and trainer.global_step == 0
        when = "before training" if is_before else f"step {trainer.global_step}"
        known = self._validation_s
        about = "" if known is None else f"; about {readable_time(known)}"
        if not trainer.sanity_checking:
            self._print(trainer, f"validation  {when}{about}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validation_s = time.monotonic() - self._validation_since

    def _print(self, trainer: L.Trainer, text: str) -> None:
        if trainer.is_global_zero:
            print(text, flush=True)

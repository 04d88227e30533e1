"""A thread that says which rank hangs, and in what."""

import threading
import time
import warnings
from collections import deque
from statistics import median
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Callback

from magnet_train.common.errors import UserError

DATA, STEP, BETWEEN, VALIDATION = (
    "waiting for data", "training step", "between steps (saving, averaging, logging)", "validation",
)  # fmt: skip
REMEMBERED = 200
"""Durations of a phase that its median is taken of."""


class Watchdog(Callback):
    """Warns once when a phase of a step takes far longer than it usually does; it never ends anything.

    A rank that hangs makes all others wait for it in their next collective, so that all of them warn: the culprit is
    the one that waits for data, or that says nothing. The first time of a phase has nothing to be compared with.
    """

    def __init__(self, factor: float = 10.0, least_s: float = 60.0):
        """What counts as far longer.

        Args:
            factor: times the median of the phase so far.
            least_s: seconds below which nothing is said.
        """
        if factor <= 1 or least_s <= 0:
            raise UserError(f"watchdog: factor={factor} must be above 1, least_s={least_s} above 0")
        self.factor, self.least_s = factor, least_s
        self._usual: dict[str, deque[float]] = {}
        self._now: tuple[str, float] | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended.clear()
        self._enter(BETWEEN)
        self._thread = threading.Thread(target=self._watch, args=(trainer,), name="watchdog", daemon=True)
        self._thread.start()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._enter(STEP)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._enter(BETWEEN)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._enter(VALIDATION)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._enter(BETWEEN)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._end()

    def _enter(self, phase: str) -> None:
        now = time.monotonic()
        if self._now is not None:
            before, since = self._now
            self._usual.setdefault(before, deque(maxlen=REMEMBERED)).append(now - since)
        self._now = phase, now

    def _end(self) -> None:
        self._ended.set()
        self._now = None
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _watch(self, trainer: L.Trainer) -> None:
        told: tuple[str, float] | None = None
        while not self._ended.wait(min(5.0, self.least_s / 4)):
            now = self._now
            if now is None or now == told or not (usual := list(self._usual.get(now[0], ()))):
                continue
            spent, normal = time.monotonic() - now[1], median(usual)
            if spent > max(self.least_s, self.factor * normal):
                told = now
                phase = DATA if now[0] == BETWEEN and _waits_for_data(trainer) else now[0]
                warnings.warn(
                    f"rank {trainer.global_rank}, after step {trainer.global_step}: {phase} for {spent:.0f} s, usually "
                    f"{normal:.3g} s",
                    stacklevel=1,
                )


def _waits_for_data(trainer: L.Trainer) -> bool:
    return getattr(trainer.train_dataloader, "waiting_since", None) is not None

"""A thread that reports which rank hangs, and in which phase."""

import threading
import time
import warnings
from collections import deque
from statistics import median
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Callback

from magnet_train.common.ranges import check_values

DATA = "waiting for data"
STEP = "training step"
BETWEEN = "between steps (saving, averaging, logging)"
VALIDATION = "validation"
HISTORY = 200
"""Number of durations for the median of a phase."""


class Watchdog(Callback):
    """Watchdog: warn once if a phase of a step takes far longer than usual.

    It never ends the run. If one rank hangs, all others wait for it in their next collective and
    warn too: the cause is the rank that waits for data, or that prints nothing. The first duration
    of a phase is not checked.
    """

    def __init__(self, factor: float = 10.0, min_seconds: float = 60.0):
        """
        Args:
            factor: Warn if a phase takes this many times its median.
            min_seconds: Never warn below this many seconds.
        """
        self.factor = factor
        self.min_seconds = min_seconds
        check_values(self, "watchdog: ", factor="(1, inf)", min_seconds="(0, inf)")
        self._history: dict[str, deque[float]] = {}
        self._phase: tuple[str, float] | None = None
        """The current phase and its start time."""
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended.clear()
        self._enter(BETWEEN)
        self._thread = threading.Thread(
            target=self._watch, args=(trainer,), name="watchdog", daemon=True
        )
        self._thread.start()

    def on_train_batch_start(self, *args: Any) -> None:
        self._enter(STEP)

    def on_train_batch_end(self, *args: Any) -> None:
        self._enter(BETWEEN)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._enter(VALIDATION)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._enter(BETWEEN)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._end()

    def _enter(self, phase: str) -> None:
        now = time.monotonic()
        if self._phase is not None:
            previous, since = self._phase
            self._history.setdefault(previous, deque(maxlen=HISTORY)).append(now - since)
        self._phase = (phase, now)

    def _end(self) -> None:
        self._ended.set()
        self._phase = None
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _watch(self, trainer: L.Trainer) -> None:
        reported: tuple[str, float] | None = None
        while not self._ended.wait(min(5.0, self.min_seconds / 4)):
            current = self._phase
            if current is None or current == reported:
                continue
            phase, since = current
            history = list(self._history.get(phase, ()))
            seconds = time.monotonic() - since
            if history and seconds > max(self.min_seconds, self.factor * median(history)):
                reported = current
                name = DATA if phase == BETWEEN and _waits_for_data(trainer) else phase
                warnings.warn(
                    f"rank {trainer.global_rank}, after step {trainer.global_step}: {name} for "
                    f"{seconds:.0f} s, usually {median(history):.3g} s",
                    stacklevel=1,
                )


def _waits_for_data(trainer: L.Trainer) -> bool:
    return getattr(trainer.train_dataloader, "waiting_since", None) is not None

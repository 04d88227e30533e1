"""A DataLoader that measures how long the training loop waits for it."""

import os
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

SIGNAL_WINDOW_S = 10.0
"""Signals within this many seconds count as one, because scheduler and launcher both send them."""
MAX_WAIT_S = 1800.0
"""Timeout of a batch in seconds, far above the retries of remote reads; a hanging store would
otherwise block all ranks."""


class TimedLoader(DataLoader):
    """torch's DataLoader that counts the seconds spent waiting for a batch.

    Its workers ignore the first SIGTERM and any SIGUSR1, which schedulers send to all processes of
    a job, because the run still needs them to finish its step and save.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        """Arguments of torch's DataLoader, except for `worker_init_fn` and `timeout`."""
        if kwargs.get("num_workers"):
            kwargs |= {"worker_init_fn": _let_signals_pass, "timeout": MAX_WAIT_S}
        super().__init__(*args, **kwargs)
        self.waited_s = 0.0
        """Total waiting time, in seconds."""
        self.waiting_since: float | None = None
        """Start of the current wait, by `time.monotonic`; None = not waiting."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()  # starts the workers now, not at the first batch
        return self._timed(batches)

    def _timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            self.waiting_since = start = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.waited_s += time.monotonic() - start
                self.waiting_since = None
            yield batch


def _let_signals_pass(worker: int) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    first: float | None = None

    def end_at_the_second(number: int, frame: FrameType | None) -> None:
        """End the worker at a second SIGTERM, which the DataLoader sends to a hanging worker."""
        nonlocal first
        now = time.monotonic()
        first = first or now
        if now - first > SIGNAL_WINDOW_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, end_at_the_second)

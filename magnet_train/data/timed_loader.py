"""A DataLoader that knows how long it was waited for."""

import os
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

TOGETHER_S = 10.0
"""Seconds within which signals are one: schedulers and launchers each tell all processes of a
job."""
LONGEST_WAIT_S = 1800.0
"""Seconds for a batch, far above what reading that fails may take; a store that never answers would
hang all ranks."""


class TimedLoader(DataLoader):
    """As torch's: it counts the seconds in which a batch was asked for and not there yet.

    Its processes let the first SIGTERM and any SIGUSR1 pass, since a scheduler sends these to all
    processes of a job: the run wants its last batches to save in peace.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        """Args as of torch's; `worker_init_fn` and `timeout` are taken."""
        if kwargs.get("num_workers"):
            kwargs |= {"worker_init_fn": _let_signals_pass, "timeout": LONGEST_WAIT_S}
        super().__init__(*args, **kwargs)
        self.waited_s = 0.0
        """In all, in seconds."""
        self.waiting_since: float | None = None
        """When the batch that is not there yet was asked for, by `time.monotonic`; None = nobody
        waits."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()  # starts the processes now, not at the first batch
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
        """The loader's own way with a process that hangs; of several at once, each from a launcher,
        the rest pass."""
        nonlocal first
        now = time.monotonic()
        first = first or now
        if now - first > TOGETHER_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, end_at_the_second)

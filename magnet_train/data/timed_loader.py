"""A DataLoader that knows how long it was waited for."""

import signal
import time
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader


class TimedLoader(DataLoader):
    """As torch's, for training: it counts the seconds in which a batch was asked for and not there yet.

    Its processes let the first SIGTERM and any SIGUSR1 pass, since a scheduler sends these to all processes of a job:
    the run wants its last batches to save in peace.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        """Args as of torch's; `worker_init_fn` is taken."""
        super().__init__(*args, worker_init_fn=_let_signals_pass if kwargs.get("num_workers") else None, **kwargs)
        self.waited_s = 0.0
        """In all, in seconds."""
        self.waiting_since: float | None = None
        """When the batch that is not there yet was asked for, by `time.monotonic`; None = nobody waits."""

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
    # The second one ends it: the loader's own way with a process that hangs.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))

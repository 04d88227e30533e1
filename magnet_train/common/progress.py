"""Progress bars of phases: each phase also prints one line with its expected time."""

from typing import Any

from tqdm import tqdm

MEASURED_S = 3.0
"""Time from the start of a phase after which its length is estimated, in seconds."""


def readable_time(seconds: float) -> str:
    """
    >>> readable_time(0.62), readable_time(42.3), readable_time(250), readable_time(8000)
    ('0.6 s', '42 s', '4 min', '2.2 h')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def count(number: int, noun: str) -> str:
    """
    >>> count(1, "clip"), count(1200, "clip")
    ('1 clip', '1,200 clips')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class PhaseBar(tqdm):
    """A progress bar that disappears at its end, and a line that stays.

    The line has the time that is left, as soon as it can be estimated; for a short phase, the time
    that it took.
    """

    def __init__(
        self,
        phase: str,
        total: int,
        unit: str,
        batch_size: int = 1,
        quiet: bool = False,
        **settings: Any,
    ):
        """
        Args:
            phase: what is done, such as "encoding".
            total: number of units.
            unit: noun, in the singular.
            batch_size: units that are finished together; the estimate waits for a full batch.
            quiet: whether nothing is shown.
            settings: others of tqdm.
        """
        self._is_reported = quiet
        self._batch_size = batch_size
        super().__init__(desc=phase, total=total, unit=unit, leave=False, disable=quiet, **settings)

    def update(self, n: float | None = 1) -> bool | None:
        shown = super().update(n)
        if not self._is_reported:
            self._report()
        return shown

    def _report(self) -> None:
        """Print the line if the phase ends or its length can be estimated."""
        seconds, done = self.format_dict["elapsed"], self.n - self.initial
        is_measured = seconds >= MEASURED_S and done > 0 and done % self._batch_size == 0
        if self.n < self.total and not is_measured:
            return
        self._is_reported = True
        left = seconds * (self.total - self.n) / max(done, 1)
        time = f"about {readable_time(left)} left" if left else readable_time(seconds)
        self.write(f"{self.desc.removesuffix(': '):<11} {count(self.total, self.unit)}; {time}")

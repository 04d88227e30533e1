"""What the metrics share: an item counts once."""

from typing import Any

from torchmetrics import Metric


class ItemMetric(Metric):
    """A metric of sums over named items, each counted once however often it comes.

    Within a rank a repeated name is passed over. Names do not cross ranks: the caller gives each rank its own items.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def _is_new(self, key: str | None) -> bool:
        """Whether this item is to be counted; without a name it always is."""
        if key is None:
            return True
        if key in self._seen:
            return False
        self._seen.add(key)
        return True

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Only updates: torchmetrics' own would reset on the way, and the names with it."""
        self.update(*args, **kwargs)

    def reset(self) -> None:
        """Forgets all sums and names."""
        super().reset()
        self._seen = set()

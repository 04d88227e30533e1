"""What the metrics share: an item counts once, sums cross ranks, and what needs the items gathers them by id."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from magnet_train.common.errors import UserError


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


class ItemMean(ItemMetric):
    """Mean of the values that items bring, one or several each, in float64; ranks must own different items."""

    what = "a mean"
    """Names the metric in errors."""
    remedy = "score at least one clip"
    total: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for state in ("total", "squares", "count"):
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, values: Tensor, key: str | None) -> None:
        if not self._is_new(key):
            return
        values = values.detach().double().to(self.total.device)
        self.total = self.total + values.sum()
        self.squares = self.squares + values.square().sum()
        self.count = self.count + values.numel()

    def compute(self) -> Tensor:
        """The mean.

        Raises:
            UserError: if no item was added on any rank.
        """
        if self.count == 0:
            raise UserError(f"{self.what} has no clips: {self.remedy}")
        return self.total / self.count

    def half_interval(self) -> float:
        """Half the width of the mean's 95 % interval over this rank's values; infinite for fewer than two."""
        n = self.count.item()
        if n < 2:
            return math.inf
        variance = max(0.0, (self.squares - self.total**2 / n).item() / (n - 1))
        return 1.96 * math.sqrt(variance / n)


def gather_by_id(items: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Every rank's items on every rank, in the order of their ids, on the CPU; a collective.

    Shapes may differ and a rank may have none; values arrive bit by bit. An id that several ranks hold, such as a
    sampler's padding, is kept once, from the lowest rank. Without torch.distributed these are the rank's own items.

    Args:
        items: this rank's, by id.
        group: the ranks that take part; all if not given.
    """
    # Cloned because a slice would carry the whole tensor that it was cut from.
    own = {key: value.detach().cpu().clone() for key, value in items.items()}
    everyone: list[Any] = [own]
    if dist.is_available() and dist.is_initialized():
        everyone = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, own, group=group)
    merged: dict[str, Tensor] = {}
    for part in reversed(everyone):
        merged.update(part)
    return dict(sorted(merged.items()))


def gathered(items: list[Any], group: dist.ProcessGroup | None = None) -> list[Any]:
    """The items of all ranks, those of the lowest first; a collective. Pickled: for plain values and small tensors."""
    if not (dist.is_available() and dist.is_initialized()):
        return items
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, items, group=group)
    return [item for part in parts for item in part]

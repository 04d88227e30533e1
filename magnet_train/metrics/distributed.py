"""Exchange of items and errors between ranks; without torch.distributed, nothing is exchanged."""

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from magnet_train.common.errors import UserError


def all_gather_by_id(items: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All-gathers items by id to every rank, sorted, on CPU. Collective.

    Shapes may differ, and a rank may have no items. Values stay bit-identical. If several ranks
    have the same id, such as the padding of a sampler, the lowest rank's item is kept.
    """
    # Cloned because pickling a slice sends the complete underlying tensor.
    local = {key: value.detach().cpu().clone() for key, value in items.items()}
    merged: dict[str, Tensor] = {}
    for part in reversed(all_gather_list([local])):
        merged.update(part)
    return dict(sorted(merged.items()))


def all_gather_list(items: list[Any]) -> list[Any]:
    """Concatenate the lists of all ranks in order; pickled, so for small objects. Collective."""
    if not (dist.is_available() and dist.is_initialized()):
        return items
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Context that fails on every rank if it fails on any, so that no rank waits for a failed one.

    A rank with an error raises it with its traceback. The others raise the error of the lowest
    failed rank: a UserError as a UserError, anything else as a RuntimeError with the traceback.
    The end of the context is collective.

    Raises:
        Exception: this rank's own error.
        UserError: another rank's.
        RuntimeError: for any other exception of another rank.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    report = None
    if isinstance(error, UserError):
        report = UserError, str(error)
    elif error is not None:
        report = RuntimeError, "".join(traceback.format_exception(error))
    reports = all_gather_list([report])
    if error is not None:
        raise error
    for rank, found in enumerate(reports):
        if found is not None:
            kind, message = found
            raise kind(f"rank {rank}: {message}")

"""Exchange of items and errors between ranks; without torch.distributed these functions leave
things as they are."""

import traceback
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from magnet_train.common.errors import UserError


def all_gather_by_id(
    items: Mapping[str, Tensor], group: dist.ProcessGroup | None = None
) -> dict[str, Tensor]:
    """All-gathers items by id to every rank, sorted, on CPU. Collective.

    Shapes may differ and a rank may have no items; values arrive bit by bit. An id that several
    ranks have, such as the padding of a sampler, is kept once, from the lowest rank.

    Args:
        items: this rank's items, by id.
        group: the ranks that take part; all of them if None.
    """
    # Cloned because pickling a slice sends the whole tensor that it was cut from.
    local = {key: value.detach().cpu().clone() for key, value in items.items()}
    merged: dict[str, Tensor] = {}
    for part in reversed(all_gather_list([local], group)):
        merged.update(part)
    return dict(sorted(merged.items()))


def all_gather_list(items: list[Any], group: dist.ProcessGroup | None = None) -> list[Any]:
    """Concatenates the lists of all ranks, the lowest rank first. Pickled: for small objects.
    Collective."""
    if not (dist.is_available() and dist.is_initialized()):
        return items
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, items, group=group)
    return [item for part in parts for item in part]


def raise_on_all_ranks(error: Exception | None) -> None:
    """Raises on every rank if any rank passes an error, so that no rank waits for one that has
    failed. Collective.

    A rank that has an error raises that one, with its traceback. The other ranks raise the error of
    the lowest rank that has one, with its text: a UserError as a UserError, anything else as a
    RuntimeError with the traceback.

    Args:
        error: what this rank has caught; None if its work has succeeded.

    Raises:
        Exception: this rank's own error.
        UserError: another rank's.
        RuntimeError: for any other exception of another rank.
    """
    report = None
    if error is not None:
        is_user_error = isinstance(error, UserError)
        report = str(error) if is_user_error else "".join(traceback.format_exception(error))
        report = (is_user_error, report)
    reports = all_gather_list([report])
    if error is not None:
        raise error
    for rank, found in enumerate(reports):
        if found is not None:
            is_user_error, message = found
            raise (
                UserError(f"rank {rank}: {message}")
                if is_user_error
                else RuntimeError(f"rank {rank}: {message}")
            )

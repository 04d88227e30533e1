"""Settings with one number per codebook, in a short form."""

from collections.abc import Sequence
from typing import TypeVar

from magnet_train.common.errors import UserError

Number = TypeVar("Number", int, float)


def per_codebook(name: str, numbers: Sequence[Number], num_codebooks: int) -> tuple[Number, ...]:
    """One number per codebook; the last number is repeated for all further codebooks.

    >>> per_codebook("context", [-1, 25, 12], num_codebooks=5)
    (-1, 25, 12, 12, 12)

    Raises:
        UserError: if there is no number, or more numbers than codebooks.
    """
    if not 1 <= len(numbers) <= num_codebooks:
        raise UserError(
            f"{name}={list(numbers)} has {len(numbers)} numbers for {num_codebooks} codebooks: "
            f"give 1 to {num_codebooks}; the last is repeated for further codebooks"
        )
    return (*numbers, *[numbers[-1]] * (num_codebooks - len(numbers)))

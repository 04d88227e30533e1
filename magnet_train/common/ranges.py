"""Checks of settings: numbers in intervals, choices, and one number per codebook."""

import re
import sys
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from magnet_train.common.errors import UserError

Number = TypeVar("Number", int, float)

_INTERVAL = re.compile(r"([\[(])([^,]+), ([^,\])]+)([\])])(.*)")


def check_values(settings: Any, prefix: str = "", **intervals: str) -> None:
    """Check numbers against intervals, and all fields of a dataclass with a Literal type.

    Args:
        settings: an object or mapping with these names. None is always allowed. A tuple or list
            needs a number, and all of its numbers are checked.
        prefix: text before the name, such as "--".
        intervals: by name, such as "[0, 1)", "(0, inf)" or "[1, 64] frames".

    Raises:
        UserError: for the first invalid value; NaN is outside of any interval.

    >>> check_values({"decay": 0.5}, "averaging: ", decay="[0, 1)")
    """
    values = settings if isinstance(settings, Mapping) else vars(settings)
    for name, interval in intervals.items():
        value = values[name]
        if value is None:
            continue
        numbers = as_tuple(value)
        if not numbers:
            raise UserError(f"{prefix}{name}=[] has no number: give at least one")
        if not all(_contains(interval, number) for number in numbers):
            shown = numbers[0] if len(numbers) == 1 else list(numbers)
            raise UserError(f"{prefix}{name}={shown} must be {in_words(interval)}")
    for name, hint in get_type_hints(type(settings)).items() if is_dataclass(settings) else ():
        if get_origin(hint) is Literal and values[name] not in get_args(hint):
            known = " or ".join(map(str, get_args(hint)))
            raise UserError(f"{prefix}{name}={values[name]} must be {known}")


def check_types(settings: Any, hints: Mapping[str, Any] | None = None) -> None:
    """Check the types of settings from an untrusted file: lists count as tuples, and mappings as
    dataclasses.

    Args:
        settings: a dataclass, or a mapping.
        hints: types by name (default: those of the dataclass).

    Raises:
        UserError: for the first unknown name, or value of another type.

    >>> check_types({"seed": 5, "lora": ["a"]}, {"seed": int, "lora": list[str]})
    """
    values = settings if isinstance(settings, Mapping) else vars(settings)
    hints = get_type_hints(type(settings)) if hints is None else hints
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"{name} is unknown")
        if not _has_type(value, hints[name]):
            wanted = getattr(hints[name], "__name__", hints[name])
            raise UserError(f"{name}={str(value)[:80]!r} must be {wanted}")


def _has_type(value: Any, hint: Any) -> bool:
    if kinds := get_args(hint):
        return _has_generic_type(value, get_origin(hint), kinds)
    if is_dataclass(hint) and isinstance(value, Mapping):
        fields = get_type_hints(hint)
        return all(name in fields and _has_type(v, fields[name]) for name, v in value.items())
    return hint is Any or type(value) is hint or (hint is float and type(value) is int)


def _has_generic_type(value: Any, origin: Any, kinds: tuple[Any, ...]) -> bool:
    """Whether a value has a type with arguments, such as list[int]."""
    if origin in (tuple, list):
        return isinstance(value, tuple | list) and all(_has_type(v, kinds[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(_has_type(v, kinds[1]) for v in value.values())
    if origin is Literal:
        return value in kinds
    return any(_has_type(value, kind) for kind in kinds)  # a union


def _parts(interval: str) -> tuple[bool, float, float, bool, str]:
    found = _INTERVAL.fullmatch(interval)
    assert found is not None
    opening, low, high, closing, unit = found.groups()
    return opening == "[", _number(low), _number(high), closing == "]", unit


def _number(text: str) -> float:
    """The number as int where possible, because a float cannot represent large seeds exactly."""
    return int(text) if text.isdigit() else float(text)


def _contains(interval: str, number: float) -> bool:
    if not abs(number) <= sys.float_info.max:  # NaN, or an integer that no float can hold
        return False
    from_low, low, high, to_high, _ = _parts(interval)
    return (low <= number if from_low else low < number) and (
        number <= high if to_high else number < high
    )


def in_words(interval: str) -> str:
    """An interval as text for messages.

    >>> in_words("[0, 1]"), in_words("(0, inf) seconds"), in_words("[0, 1)")
    ('from 0 to 1', 'above 0 seconds', 'at least 0 and below 1')
    """
    from_low, low, high, to_high, unit = _parts(interval)
    if from_low and to_high:
        return f"from {low:,} to {high:,}{unit}"
    words = f"{'at least' if from_low else 'above'} {low:,}"
    if high < float("inf"):
        words += f" and {'at most' if to_high else 'below'} {high:,}"
    return words + unit


def as_tuple(value: Number | tuple[Number, ...] | list[Number]) -> tuple[Number, ...]:
    """Numbers as tuple, also a single one."""
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def per_codebook(
    name: str, value: Number | tuple[Number, ...] | list[Number], num_codebooks: int
) -> tuple[Number, ...]:
    """One number per codebook; the last number is repeated for all further codebooks.

    >>> per_codebook("context", [-1, 25, 12], num_codebooks=5)
    (-1, 25, 12, 12, 12)

    Raises:
        UserError: if there is no number, or more numbers than codebooks.
    """
    numbers = as_tuple(value)
    if not 1 <= len(numbers) <= num_codebooks:
        raise UserError(
            f"{name}={list(numbers)} has {len(numbers)} numbers for {num_codebooks} codebooks: "
            f"give 1 to {num_codebooks}; the last is repeated for further codebooks"
        )
    return (*numbers, *[numbers[-1]] * (num_codebooks - len(numbers)))

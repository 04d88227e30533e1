"""Settings dataclasses as form fields, with the help texts of the command line."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from magnet_train.common.errors import UserError


@dataclass(frozen=True)
class FormField:
    """One setting in a form."""

    name: str
    help: str
    kind: Literal["bool", "int", "float", "choice", "text"]
    """The widget; "text" is also used for lists of numbers and for optional values."""
    choices: tuple[str, ...] = ()


def form_fields(settings: type) -> list[FormField]:
    """The fields of a dataclass, in its order; the help texts are its attribute docstrings."""
    from docstring_parser import parse_from_object

    parts = [part for kind in settings.__mro__[:-1] for part in parse_from_object(kind).params]
    helps = {part.arg_name: part.description or "" for part in parts}
    hints = get_type_hints(settings)
    return [_form_field(f.name, hints[f.name], helps[f.name]) for f in fields(settings)]


def _form_field(name: str, hint: Any, text: str) -> FormField:
    text = " ".join(text.split()).replace("--", "")  # other options are fields too
    if get_origin(hint) is Literal:
        return FormField(name, text, "choice", get_args(hint))
    kinds: dict[Any, Literal["bool", "int", "float"]] = {bool: "bool", int: "int", float: "float"}
    return FormField(name, text, kinds.get(hint, "text"))


def to_form(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of form fields for settings: lists become text, None becomes empty text.

    >>> to_form({"decoding_steps": (20, 10), "rescorer": None, "top_p": 0.9})
    {'decoding_steps': '20, 10', 'rescorer': '', 'top_p': 0.9}
    """
    shown = {}
    for name, value in values.items():
        if isinstance(value, tuple | list):
            value = ", ".join(f"{number:g}" for number in value)
        shown[name] = "" if value is None else value
    return shown


def from_form(settings: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from the values of form fields.

    Raises:
        UserError: if a value is missing or of the wrong kind; names the setting.
    """
    hints = get_type_hints(settings)
    return {name: _from_widget(name, hints[name], value) for name, value in values.items()}


def _from_widget(name: str, hint: Any, value: Any) -> Any:
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if hint is str or get_origin(hint) is Literal:
        return value or ""
    if hint is bool:
        return bool(value)
    if value is None or str(value).strip() == "":
        if NoneType in kinds:
            return None
        raise UserError(f"{name}: give a value")
    if str in kinds:
        return str(value).strip()
    return _numbers(name, kinds, str(value))


def _numbers(name: str, kinds: tuple[Any, ...], text: str) -> float | tuple[float, ...]:
    """One number, or a list of numbers where `kinds` has one."""
    lists = [kind for kind in kinds if get_origin(kind) is tuple]
    number = int if int in kinds or any(int in get_args(kind) for kind in lists) else float
    numbers = tuple(_number(name, part, number) for part in text.replace(",", " ").split())
    if lists and (len(numbers) > 1 or not {int, float} & set(kinds)):
        return numbers
    if len(numbers) != 1:
        raise UserError(f"{name}={text}: give one number")
    return numbers[0]


def _number(name: str, text: str, kind: type[int] | type[float]) -> int | float:
    try:
        number = float(text)
        if not math.isfinite(number) or (kind is int and number != int(number)):
            raise ValueError
    except ValueError as error:
        wanted = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{name}={text}: give {wanted}") from error
    return kind(number)

"""Nested mappings under dotted names."""

from collections.abc import Iterator, Mapping
from typing import Any

MAX_DEPTH = 20


def flatten(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values, in order; an empty mapping is a value.

    Raises:
        ValueError: if mappings are nested deeper than `MAX_DEPTH`, or contain themselves.

    >>> dict(flatten({"model": {"dim": 64, "text": {}}, "seed": 1}))
    {'model.dim': 64, 'model.text': {}, 'seed': 1}
    """
    if prefix.count(".") > MAX_DEPTH:
        raise ValueError("nested without end")
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

"""Notes what a rescorer is asked for."""

from typing import Any

import pytest


def count_readings(monkeypatch: pytest.MonkeyPatch, rescorer: Any) -> list[int]:
    """Number of captions in each call of `reading` of a class, appended while the test runs."""
    counts: list[int] = []
    reading = rescorer.reading

    def counted(own: Any, texts: Any) -> Any:
        counts.append(len(texts))
        return reading(own, texts)

    monkeypatch.setattr(rescorer, "reading", counted)
    return counts

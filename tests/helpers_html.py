"""Reads the elements of an HTML page, and what a browser would load."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import soundfile


class Page(HTMLParser):
    """Elements of an HTML file as (tag, attributes), and its text outside of style and script."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self._inside: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "script" in self._inside:
            self.scripts.append(data)
        elif "style" not in self._inside:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def loaded(self) -> list[str]:
        """Everything that a browser would request: sources, links to other pages, forms."""
        names = ("src", "href", "action", "data", "poster", "srcset")
        found = [a[name] for _, a in self.elements for name in names if name in a]
        return [value for value in found if not value.startswith(("data:", "#"))]


def sound(uri: str) -> tuple[np.ndarray, int]:
    """Samples of an audio element's `src`."""
    return soundfile.read(io.BytesIO(base64.b64decode(uri.partition(",")[2])), always_2d=True)


HOSTILE = (
    """</script><b onclick="x">bold</b><img src="http://example.org/x.png"> & 'q' "q" \u2028"""
)
RATE = 16_000


def tone(hertz: float = 440, seconds: float = 1.0, rate: int = RATE) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))

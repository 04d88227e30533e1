"""HTML of clips: spectrogram, player and order of unmasking.

Each clip is a `<clip-view>`, which clip.js makes playable. Audio and images are data URIs, so that
the server serves no files.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from magnet_train.common.audio_files import listening_loudness, normalize_for_listening
from magnet_train.evaluation.page import audio_uri, data_uri, read_sound, text
from magnet_train.evaluation.report import spectrogram_uri

GIVEN = (150, 150, 150)
UNDECIDED = (214, 218, 222)


@dataclass(frozen=True)
class Clip:
    """A clip to show."""

    path: Path
    title: str
    note: str = ""
    """Short text at the right, such as a score."""
    order: np.ndarray | None = None
    """`k t`, step of its stage at which a code became final; -1 = given."""
    regions: Sequence[tuple[float, float]] = ()
    """Regenerated regions to outline, in seconds."""


def clips_html(clips: Sequence[Clip], group: str, edits: str = "") -> str:
    """The clips side by side, all at the loudness of the one that allows the least gain.

    Args:
        clips: the clips; the keys 1 to 9 switch between them at the same position.
        group: name of the group of clips that are compared.
        edits: id of the text field with the regions that are marked on the first clip.
    """
    loudness = min((_loudness(clip.path, _version(clip.path)) for clip in clips), default=0.0)
    cells = (_clip_html(clip, group, loudness, "" if i else edits) for i, clip in enumerate(clips))
    return f'<div class="clips">{"".join(cells)}</div>' if clips else ""


def _clip_html(clip: Clip, group: str, loudness: float, edits: str) -> str:
    image, audio, seconds = _encoded(clip.path, _version(clip.path), round(loudness, 1))
    outlines = "".join(
        f'<s style="left:{100 * start / seconds:.3f}%;width:{100 * (end - start) / seconds:.3f}%">'
        "</s>"
        for start, end in clip.regions
    )
    title = text(clip.title)
    if edits:
        keys = "Drag to mark a region. Keys: [ and ] mark its ends, Delete removes it"
        focus = f'tabindex="0" role="group" aria-label="{keys}" title="{keys}"'
    else:
        focus = 'title="Click to play from here"'
    return (
        f'<clip-view data-group="{text(group)}" data-seconds="{seconds:.6f}" '
        f'data-edits="{text(edits)}"><header><b>{title}</b><small>{text(clip.note)}</small>'
        f'</header><figure {focus}><img alt="Spectrogram of {title}" src="{image}" '
        f'draggable="false">{outlines}<div class="regions"></div><i></i></figure>'
        f'<audio controls preload="auto" aria-label="{title}" src="{audio}"></audio>'
        f"{order_html(clip.order)}</clip-view>"
    )


def _version(path: Path) -> int:
    return path.stat().st_mtime_ns


@lru_cache(maxsize=256)
def _loudness(path: Path, version: int) -> float:
    """Loudness in LUFS to which the clip can be raised."""
    return listening_loudness(*read_sound(path))


@lru_cache(maxsize=128)
def _encoded(path: Path, version: int, loudness: float) -> tuple[str, str, float]:
    """Spectrogram and audio as data URIs, and the length in seconds."""
    wav, sample_rate = read_sound(path)
    wav = normalize_for_listening(wav, sample_rate, loudness)
    image = spectrogram_uri(wav, sample_rate)
    return image, audio_uri(wav, sample_rate), len(wav) / sample_rate


def order_html(order: np.ndarray | None, masked: np.ndarray | None = None) -> str:
    """HTML of an image of the order of unmasking; empty without `order`.

    Args:
        order: `k t`, step of its stage at which a code became final; -1 = given.
        masked: bool `k t`, codes that are not decided yet.
    """
    if order is None:
        return ""
    caption = "Order of unmasking: dark = first, grey = given"
    image = data_uri("image/png", order_png(order, masked))
    return f'<img class="order" alt="{caption}" title="{caption}" src="{image}">'


def order_png(order: np.ndarray, masked: np.ndarray | None = None) -> bytes:
    """PNG of the order of unmasking: one pixel per code, the lowest codebook at the top."""
    from matplotlib import colormaps
    from matplotlib.image import imsave

    share = order / np.maximum(order.max(axis=1, keepdims=True), 1)
    pixels: NDArray[np.uint8] = colormaps["viridis"](share, bytes=True)[..., :3]
    pixels[order < 0] = GIVEN
    if masked is not None:
        pixels[masked] = UNDECIDED
    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png")
    return buffer.getvalue()

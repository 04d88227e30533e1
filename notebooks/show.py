"""Spectrograms, players and animations for the notebooks; nothing here is about MAGNeT."""

import io
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.animation import FuncAnimation
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from magnet_train.common.audio_files import draw_spectrogram, normalize_for_listening, write_sound
from magnet_train.evaluation.page import audio_uri, text

plt.rcParams.update(
    {"figure.dpi": 72, "figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False}
)

AUDIO = Path("audio")
"""Folder of the files that notebooks link to, for readers on GitHub."""


class Players:
    """What `players` returns; a notebook shows it as HTML."""

    def __init__(self, html: str):
        self._html = html

    def _repr_html_(self) -> str:
        return self._html

    def __repr__(self) -> str:
        return "players: run the notebook to hear them"


def players(sounds: dict[str, Tensor], sample_rate: int, save: str = "") -> Players:
    """A player for each mono clip `… t`, side by side under its title, at -14 LUFS each.

    With `save`, the clips are also written to AUDIO as `SAVE-TITLE.ogg`.
    """
    cells = []
    for title, wav in sounds.items():
        samples = normalize_for_listening(wav.reshape(-1, 1).numpy(), sample_rate)
        if save:
            AUDIO.mkdir(exist_ok=True)
            file = AUDIO / f"{save}-{title.replace(' ', '-')}.ogg"
            write_sound(file, samples, sample_rate, compression_level=0.7)
        source = audio_uri(samples, sample_rate)
        player = f'<audio controls preload="metadata" style="width:14em" src="{source}"></audio>'
        cells.append(f'<div style="margin:0 1em 1em 0">{text(title)}<br>{player}</div>')
    return Players(f'<div style="display:flex;flex-wrap:wrap">{"".join(cells)}</div>')


def spectrogram(axis: Axes, wav: Tensor, sample_rate: int, title: str = "") -> None:
    """Draw the level of a mono clip `… t` over time and frequency, 70 dB down from its loudest bin."""
    draw_spectrogram(axis, wav.flatten().numpy(), sample_rate, title, range_db=70)
    axis.set(xlabel="seconds")


class Movie:
    """What `movie` returns: a player with buttons where scripts run, a picture that moves elsewhere."""

    def __init__(self, figure: Figure, draw: Callable[[int], None], num_frames: int, fps: int):
        self._html = FuncAnimation(figure, lambda i: draw(i) or (), frames=num_frames).to_jshtml(fps)
        pictures = []
        for i in range(num_frames):
            draw(i)
            figure.canvas.draw()
            pictures.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB"))  # type: ignore
        file = io.BytesIO()
        pauses = [1000 // fps] * (num_frames - 1) + [3000]
        pictures[0].save(file, "PNG", save_all=True, append_images=pictures[1:], duration=pauses, loop=0)
        self._png = file.getvalue()
        plt.close(figure)

    def _repr_html_(self) -> str:
        return self._html

    def _repr_png_(self) -> bytes:
        return self._png

    def __repr__(self) -> str:
        return "animation: run the notebook for its buttons"


def movie(figure: Figure, draw: Callable[[int], None], num_frames: int, fps: int = 3) -> Movie:
    """An animation of `figure`, whose `draw(i)` changes it to frame i."""
    return Movie(figure, draw, num_frames, fps)

"""Audio as people meet it: at -14 LUFS, in files whose names can be recognised, with a picture."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from magnet_train.common.errors import UserError

TARGET_LUFS = -14.0


def normalize_loudness(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """`t channels` at -14 LUFS (ITU-R BS.1770), clamped to [-1, 1], as the published MAGNeT samples are.

    Near silence (RMS below 2e-3) stays as it is, where a gain would only lift noise; so do clips below 0.4 s,
    the shortest that the measure is defined for.
    """
    import pyloudnorm

    if len(wav) < 0.4 * sample_rate or np.sqrt(np.mean(np.square(wav))) < 2e-3:
        return wav
    loudness = pyloudnorm.Meter(sample_rate).integrated_loudness(wav)
    if not np.isfinite(loudness):
        return wav
    return np.clip(wav * 10 ** ((TARGET_LUFS - loudness) / 20), -1, 1)


def recognisable_name(text: str, seed: int | None = None) -> str:
    """A file name without suffix: the first words of `text`, four hex digits against equal beginnings, the seed.

    >>> recognisable_name("A slow chorale for string quartet in G minor!", seed=3)
    'a-slow-chorale-for-string-quartet-in-g-minor_9304_seed3'
    """
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].rstrip("-") or "no-text"
    name = f"{words}_{hashlib.sha256(text.encode()).hexdigest()[:4]}"
    return name if seed is None else f"{name}_seed{seed}"


def write_audio(path: Path, wav: np.ndarray, sample_rate: int, about: dict[str, Any]) -> None:
    """Write `t channels` at -14 LUFS as 16-bit wav or flac, and `about` as JSON beside it; aside first, then moved.

    Raises:
        UserError: if the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}")
        soundfile.write(
            aside, normalize_loudness(wav, sample_rate), sample_rate, "PCM_16", format=path.suffix[1:].upper()
        )
        note = path.with_suffix(".json")
        note.with_name(f".{note.name}").write_text(json.dumps(about, indent=2) + "\n")
        os.replace(aside, path)
        os.replace(note.with_name(f".{note.name}"), note)
    except (OSError, soundfile.LibsndfileError) as error:
        raise UserError(f"{path}: cannot be written ({error}); choose another folder or free some space") from error


def write_picture(path: Path, wavs: dict[str, np.ndarray], sample_rate: int, order: np.ndarray | None = None) -> None:
    """Spectrograms of mono clips one above the other, and below them the order of unmasking of the first.

    Args:
        path: of the PNG.
        wavs: title to `t`.
        sample_rate: in Hz.
        order: `k t`, the step at which each code became final, per stage; -1 = given.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = len(wavs) + (order is not None)
    figure = Figure(figsize=(10, 2.3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, squeeze=False)[:, 0]
    for axis, (title, wav) in zip(axes, wavs.items(), strict=False):
        window = np.hanning(1024)
        padded = np.pad(wav, (0, max(0, 1024 - len(wav))))
        frames = np.lib.stride_tricks.sliding_window_view(padded, 1024)[::256] * window
        level = 20 * np.log10(np.abs(np.fft.rfft(frames)).T + 1e-3)
        seconds = len(padded) / sample_rate
        axis.imshow(
            level, origin="lower", aspect="auto", cmap="magma", vmin=level.max() - 80, vmax=level.max(),
            extent=(0, seconds, 0, sample_rate / 2000),
        )  # fmt: skip
        axis.set(title=title, ylabel="kHz")
        axis.title.set_fontsize(8)
    if order is not None:
        relative = order / np.maximum(order.max(axis=1, keepdims=True), 1)
        image = axes[-1].imshow(relative, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=1)
        axes[-1].set(title="order of unmasking: dark = decided first", ylabel="codebook", xlabel="frame")
        axes[-1].set_yticks(range(len(order)))
        axes[-1].title.set_fontsize(8)
        figure.colorbar(image, ax=axes[-1], fraction=0.02)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)

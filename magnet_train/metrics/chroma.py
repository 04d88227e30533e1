"""Chroma: pitch classes over time."""

import numpy as np

from magnet_train.common.audio_files import magnitude_spectrogram

WINDOW_S = 0.256
"""Length of a window in seconds, which separates semitones above 130 Hz."""
HOP_S = 0.064


def chroma(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """Chroma of a mono clip: `t` -> unit vectors `frames 12`, C first.

    Magnitudes of a Hann-windowed spectrum between 65 Hz and 2.1 kHz; each bin is assigned to the
    nearest semitone (A = 440 Hz). Silent frames are zero.

    >>> tone = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    >>> int(chroma(tone, 16000).mean(0).argmax())
    9
    """
    size = round(WINDOW_S * sample_rate)
    magnitude = magnitude_spectrogram(wav, size, round(HOP_S * sample_rate))
    freqs = np.fft.rfftfreq(size, 1 / sample_rate)
    audible = (freqs > 65) & (freqs < 2100)
    pitch_class = (np.round(12 * np.log2(freqs[audible] / 440)).astype(int) + 9) % 12
    folded = magnitude[:, audible] @ np.eye(12)[pitch_class]
    length = np.linalg.norm(folded, axis=1, keepdims=True)
    return np.where(length > 1e-3, folded / np.maximum(length, 1e-9), 0)


def chroma_agreement(original: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Mean cosine, and share of frames with the same strongest pitch class, without silent frames.

    Unrelated music is far from 0 in both because keys are shared, so compare with another clip as a
    control.

    Args:
        original: chroma, `frames 12`.
        other: chroma, `frames 12`; the longer one is truncated.

    Raises:
        ValueError: if the original is silent.
    """
    length = min(len(original), len(other))
    original, other = original[:length], other[:length]
    sounds = original.any(1)
    if not sounds.any():
        raise ValueError("the original is silent; its pitch cannot be compared")
    same = (original.argmax(1) == other.argmax(1)) & other.any(1)
    return float((original * other).sum(1)[sounds].mean()), float(same[sounds].mean())

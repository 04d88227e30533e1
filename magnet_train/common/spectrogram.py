"""Spectrogram for plots, reports and pitch."""

import numpy as np


def magnitude_spectrogram(wav: np.ndarray, window: int, hop: int) -> np.ndarray:
    """Hann-windowed magnitude spectrogram of a mono clip `t`: `frames bins`, window // 2 + 1 bins;
    `window` and `hop` are in samples.

    A clip shorter than one window is padded with zeros; a remainder at the end is dropped.

    >>> magnitude_spectrogram(np.ones(1024), window=256, hop=128).shape
    (7, 129)
    """
    padded = np.pad(wav, (0, max(0, window - len(wav))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]
    return np.abs(np.fft.rfft(frames * np.hanning(window)))

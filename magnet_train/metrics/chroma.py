"""Pitch classes over time, to ask whether a melody survived a codec."""

import numpy as np

from magnet_train.common.spectrogram import magnitude_spectrogram


def chroma(
    wav: np.ndarray, sample_rate: int, window_s: float = 0.256, hop_s: float = 0.064
) -> np.ndarray:
    """How much of each pitch class sounds at each moment: `t` -> unit vectors `frames 12`, C first.

    Magnitudes of a Hann-windowed spectrum between 65 Hz and 2.1 kHz, each bin given to the nearest
    semitone of A = 440 Hz. Silent moments are all zero.

    Args:
        wav: mono.
        sample_rate: in Hz.
        window_s: length of a spectrum, in seconds; 0.256 s tells semitones apart above 130 Hz.
        hop_s: distance between two, in seconds.

    >>> tone = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    >>> int(chroma(tone, 16000).mean(0).argmax())
    9
    """
    size = round(window_s * sample_rate)
    magnitude = magnitude_spectrogram(wav, size, round(hop_s * sample_rate))
    freqs = np.fft.rfftfreq(size, 1 / sample_rate)
    audible = (freqs > 65) & (freqs < 2100)
    pitch_class = (np.round(12 * np.log2(freqs[audible] / 440)).astype(int) + 9) % 12
    folded = magnitude[:, audible] @ np.eye(12)[pitch_class]
    length = np.linalg.norm(folded, axis=1, keepdims=True)
    return np.where(length > 1e-3, folded / np.maximum(length, 1e-9), 0)


def chroma_agreement(original: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Mean cosine, and share of moments with the same strongest pitch class, where the original
    sounds.

    Unrelated music is far from 0 in both, since it shares keys: compare with the control of another
    clip.

    Args:
        original: chroma, `frames 12`.
        other: chroma, `frames 12`; the longer of the two is cut.

    Raises:
        ValueError: if the original is silent throughout.
    """
    length = min(len(original), len(other))
    original, other = original[:length], other[:length]
    sounds = original.any(1)
    if not sounds.any():
        raise ValueError("the original is silent; its pitch cannot be compared")
    same = (original.argmax(1) == other.argmax(1)) & other.any(1)
    return float((original * other).sum(1)[sounds].mean()), float(same[sounds].mean())

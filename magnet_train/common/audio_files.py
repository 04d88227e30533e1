"""Writes generated audio: normalised, in files with readable names, with a JSON and a plot."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from magnet_train.common.folders import write_json, written

TARGET_LUFS = -14.0
MAX_TRUE_PEAK_DB = -1.0
"""Maximum true peak in files, in dB of full scale."""
HIGH_PASS_HZ = 20.0
FULL_SCALE = 1 - 2**-15
"""Largest sample of a 16-bit file."""


def normalize_loudness(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """Normalise `t channels` to -14 LUFS (ITU-R BS.1770), clamped to [-1, 1], for scoring.

    Same as audiocraft's `normalize_audio`, so that metrics are comparable with published ones. Near
    silence (RMS below 2e-3) is not amplified, and clips below 0.4 s, whose loudness is not defined,
    are not changed. Use `normalize_for_listening` for files to listen to.
    """
    loudness = _loudness(wav, sample_rate)
    return wav if loudness is None else np.clip(wav * 10 ** ((TARGET_LUFS - loudness) / 20), -1, 1)


def normalize_for_listening(
    wav: np.ndarray, sample_rate: int, target_lufs: float = TARGET_LUFS
) -> np.ndarray:
    """Remove DC from `t channels` and normalise to the target loudness without clipping.

    A high-pass at 20 Hz removes DC, which loudness does not measure. The gain is limited so
    that the true peak (ITU-R BS.1770-4, four times oversampled) stays below -1 dB of full scale.
    Near silence is not amplified.
    """
    wav = _high_passed(wav, sample_rate)
    loudness = _loudness(wav, sample_rate)
    gain = 1.0 if loudness is None else 10 ** ((target_lufs - loudness) / 20)
    return wav * min(gain, _max_gain(wav))


def listening_loudness(wav: np.ndarray, sample_rate: int) -> float:
    """Loudness in LUFS after `normalize_for_listening`: -14, or less if peaks are high."""
    loudness = _loudness(normalize_for_listening(wav, sample_rate), sample_rate)
    return TARGET_LUFS if loudness is None else min(loudness, TARGET_LUFS)


def clipped_share(wav: np.ndarray) -> float:
    """Share of samples at full scale or beyond, 0 to 1; more than a few in a thousand are audible.

    >>> clipped_share(np.array([0.0, 0.5, 1.0, -1.2]))
    0.5
    """
    return float(np.mean(np.abs(wav) >= FULL_SCALE)) if wav.size else 0.0


def _loudness(wav: np.ndarray, sample_rate: int) -> float | None:
    """Loudness in LUFS; None if it is not defined."""
    import pyloudnorm

    if len(wav) < 0.4 * sample_rate or np.sqrt(np.mean(np.square(wav))) < 2e-3:
        return None
    loudness = pyloudnorm.Meter(sample_rate).integrated_loudness(wav)
    return float(loudness) if np.isfinite(loudness) else None


def _high_passed(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    from scipy.signal import butter, sosfiltfilt

    if len(wav) < 2:
        return wav
    sections = butter(2, HIGH_PASS_HZ, "highpass", fs=sample_rate, output="sos")
    padding = min(len(wav) - 1, sample_rate // 5)
    return sosfiltfilt(sections, wav, axis=0, padtype="even", padlen=padding).astype(wav.dtype)


def _max_gain(wav: np.ndarray) -> float:
    """Gain at which the true peak reaches its limit."""
    from scipy.signal import resample_poly

    peak = np.abs(resample_poly(wav, 4, 1, axis=0)).max(initial=0.0)
    peak = max(peak, np.abs(wav).max(initial=0.0))
    return float(10 ** (MAX_TRUE_PEAK_DB / 20) / peak) if peak > 0 else 1.0


def slug(text: str, seed: int | None = None) -> str:
    """A file name without suffix: the first words of `text`, 12 hex digits of its hash, the seed.

    >>> slug("A slow chorale for string quartet in G minor!", seed=3)
    'a-slow-chorale-for-string-quartet-in-g-minor_930466779f7b_seed3'
    """
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].rstrip("-") or "no-text"
    name = f"{words}_{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:12]}"
    return name if seed is None else f"{name}_seed{seed}"


def write_sound(path: Path, wav: np.ndarray, sample_rate: int, **options: Any) -> None:
    """Write samples `n` or `n channels` in the format of the suffix, in blocks of a second, because
    libsndfile crashes on two minutes of Ogg Vorbis at once.

    `options` are passed to `soundfile.SoundFile`.
    """
    channels = 1 if wav.ndim == 1 else wav.shape[1]
    with soundfile.SoundFile(path, "w", sample_rate, channels, **options) as file:
        for start in range(0, len(wav), sample_rate):
            file.write(wav[start : start + sample_rate])


def write_audio(path: Path, wav: np.ndarray, sample_rate: int, about: dict[str, Any]) -> None:
    """Write `t channels`, normalised, as a 16-bit wav or flac file, and `about` as JSON next to it.

    The JSON also has the share of clipped samples in `wav`.

    Raises:
        UserError: if the folder cannot be written.
    """
    about = about | {"clipped_share": round(clipped_share(wav), 6)}
    levelled = normalize_for_listening(wav, sample_rate)
    with written(path) as temporary:
        form = path.suffix[1:].upper()
        soundfile.write(temporary, levelled, sample_rate, "PCM_16", format=form)
        write_json(path.with_suffix(".json"), about)


def save_plot(
    path: Path,
    wavs: dict[str, np.ndarray],
    sample_rate: int,
    unmask_step: np.ndarray | None = None,
    regions: Sequence[tuple[float, ...]] = (),
) -> None:
    """Save a PNG with spectrograms of mono clips and the order of unmasking of the first.

    Args:
        path: path of the PNG.
        wavs: mono clips `t` by title.
        sample_rate: sample rate in Hz.
        unmask_step: `k t`, step of its stage at which each code became final; -1 = given.
        regions: start and end in seconds, framed in every spectrogram.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = len(wavs) + (unmask_step is not None)
    height = 2.3 * rows
    figure = Figure(figsize=(10, height))
    FigureCanvasAgg(figure)
    # Matplotlib's own layout takes as long as the rest of the drawing. Margins are in inches.
    margins = {"left": 0.06, "right": 0.91, "bottom": 0.42 / height, "top": 1 - 0.25 / height}
    grid = figure.add_gridspec(rows, 1, **margins, hspace=0.42)
    axes = [figure.add_subplot(grid[row]) for row in range(rows)]
    for axis, (title, wav) in zip(axes, wavs.items(), strict=False):
        draw_spectrogram(axis, wav, sample_rate, title)
        for start, end in regions:
            axis.axvspan(start, end, fill=False, edgecolor="cyan", linestyle="--")
    if unmask_step is not None:
        relative = unmask_step / np.maximum(unmask_step.max(axis=1, keepdims=True), 1)
        image = axes[-1].imshow(
            relative, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=1
        )
        axes[-1].set(ylabel="codebook", xlabel="frame")
        axes[-1].set_title("order of unmasking: dark = decided first", fontsize=8)
        codebooks = range(len(unmask_step))
        axes[-1].set_yticks(codebooks, [str(k + 1) for k in codebooks])
        place = axes[-1].get_position()
        figure.colorbar(image, cax=figure.add_axes((0.93, place.y0, 0.012, place.height)))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def draw_spectrogram(
    axis: Any, wav: np.ndarray, sample_rate: int, title: str = "", range_db: float = 80.0
) -> None:
    """Draw the spectrogram of a mono clip `t` on matplotlib axes, down to `range_db` below its
    peak."""
    window = 1024
    level = 20 * np.log10(magnitude_spectrogram(wav, window, 256).T + 1e-3)
    seconds = max(len(wav), window) / sample_rate
    axis.imshow(
        level,
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=level.max() - range_db,
        vmax=level.max(),
        extent=(0, seconds, 0, sample_rate / 2000),
    )
    axis.set(ylabel="kHz")
    axis.set_title(title, fontsize=8)


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

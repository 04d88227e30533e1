"""Audio files to waveforms at the codec's rate: wav, flac, ogg, mp3, any rate, any number of channels."""

import os
from pathlib import Path

import numpy as np
import soundfile
import soxr

from magnet_train.common.errors import UserError

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".opus", ".aiff", ".aif")


def read_audio(path: Path, sample_rate: int, channels: int) -> np.ndarray:
    """The whole file as float32 `channels t`; mono is the mean of all channels, stereo of a mono file its copy.

    Args:
        path: of a file that libsndfile reads.
        sample_rate: wanted, in Hz; resampled by soxr where the file's differs.
        channels: wanted, 1 or 2.

    Raises:
        UserError: if the file is unreadable, empty, truncated, or holds NaN or infinite samples.
    """
    try:
        with soundfile.SoundFile(os.fsencode(path)) as file:  # type: ignore[arg-type]
            promised, rate = file.frames, file.samplerate
            wav = file.read(dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError, RuntimeError) as error:
        raise UserError(f"{path}: unreadable ({error}); convert or remove it") from error
    if len(wav) == 0:
        raise UserError(f"{path}: empty; remove it")
    if len(wav) < promised or _is_cut_off(path):
        raise UserError(f"{path}: truncated after {len(wav)} samples; copy it again or remove it")
    if not np.isfinite(wav).all():
        raise UserError(f"{path}: holds NaN or infinite samples; repair or remove it")
    if channels == 1:
        wav = _mean(wav)
    elif wav.shape[1] != channels:
        wav = np.repeat(_mean(wav), channels, axis=1)
    if rate != sample_rate:
        wav = soxr.resample(wav, rate, sample_rate)
    return np.ascontiguousarray(wav.T, dtype=np.float32)


def _mean(wav: np.ndarray) -> np.ndarray:
    """Of all channels, `t 1`; of stereo by hand, to the same bit: numpy takes as long for it as the file to decode."""
    return (wav[:, :1] + wav[:, 1:]) / np.float32(2) if wav.shape[1] == 2 else wav.mean(axis=1, keepdims=True)


def _is_cut_off(path: Path) -> bool:
    """Whether a WAV or AIFF promises more bytes than it has; libsndfile takes it for a short one."""
    with open(path, "rb") as file:
        kind, size = file.read(4), file.read(4)
    if kind not in (b"RIFF", b"FORM"):
        return False
    promised = int.from_bytes(size, "little" if kind == b"RIFF" else "big")
    return promised < 0x7FFFF000 and promised + 8 > path.stat().st_size  # what writes to a pipe promises the most


def duration_s(path: Path) -> float:
    """Length in seconds by the header alone.

    Raises:
        UserError: if the file is unreadable or empty.
    """
    try:
        info = soundfile.info(os.fsencode(path))  # type: ignore[arg-type]
    except (soundfile.LibsndfileError, OSError, RuntimeError) as error:
        raise UserError(f"{path}: unreadable ({error}); convert or remove it") from error
    if info.frames == 0:
        raise UserError(f"{path}: empty; remove it")
    return info.frames / info.samplerate

"""Reads audio files of any sample rate and number of channels at the codec's rate.

libsndfile is used first, and ffmpeg, if installed, for formats that libsndfile does not support.
The length of a file is the number of decoded samples: MP3 headers only estimate it, concatenated
files have several streams, and programs that write to a pipe do not know it.
"""

import io
import mmap
import os
import re
import shutil
import stat
import subprocess
import threading
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import soundfile
import soxr

from magnet_train.common.errors import UserError

SOUNDFILE_SUFFIXES = (".wav", ".wave", ".flac", ".ogg", ".oga", ".mp3", ".opus", ".aiff", ".aif")
SOUNDFILE_SUFFIXES += (".aifc", ".au", ".caf", ".w64", ".rf64")
FFMPEG_SUFFIXES = (".m4a", ".m4b", ".mp4", ".aac", ".wma", ".ape", ".wv", ".mka", ".webm", ".ac3")
FFMPEG_SUFFIXES += (".amr",)
SUFFIXES = SOUNDFILE_SUFFIXES + FFMPEG_SUFFIXES
MIN_RATE, MAX_RATE = 1_000, 768_000
"""Supported sample rates, in Hz."""
MAX_PEAK = 10.0
"""20 dB above full scale; louder samples are integers written as floats."""
MAX_VALUES = 1 << 31
"""Maximum number of samples of all channels, which are in memory as float32."""
MAX_BYTES = 1 << 31
"""Maximum size of an MP3 or Ogg file, which is read as a whole."""
MAX_FRAMES_PER_BYTE = 1000
"""Above this, a length in a header is not trusted; FLAC takes a byte for 400 frames of silence."""
FFMPEG_MAGIC = (b"\xff\xf1", b"\xff\xf9", b"\x30\x26\xb2\x75", b"\x1a\x45\xdf\xa3")
"""First bytes of AAC (two kinds), ASF (wma) and Matroska (webm)."""
FFMPEG_TIMEOUT_S = 600
FFMPEG_FORMATS = "mov,matroska,aac,loas,asf,ape,wv,ac3,eac3,amr,flac,wav,ogg,mp3,caf,mpegts"
"""Formats that ffmpeg may find in a file; others, such as playlists, name further files."""
SIZE_TOLERANCE = 8
"""Bytes by which programs miscount the size of a WAV (its header, or a missing pad byte)."""
OTHER_MAGIC = (b"OggS", b"RIFF", b"RF64", b"FORM", b"fLaC")
"""First bytes of formats that are not MP3."""
FLAC_HEADS = (b"fLaC\0\0\0\x22", b"fLaC\x80\0\0\x22")
"""First bytes of a FLAC: its name, and the header of the block that has its length."""
ONE_BY_ONE = (1, 3, 6, 7, 0xFFFE)
"""WAV codings (PCM, float, A-law, mu-law) whose samples are coded one by one; in a block of the
other codings, one missing byte damages hundreds of samples."""
MAX_CHUNKS = 1000
BLOCK_FRAMES = 1 << 20


def read_audio(path: Path, sample_rate: int, channels: int) -> np.ndarray:
    """Read a file as float32 `channels t`; mono is the mean of all channels, stereo repeats it.

    Args:
        path: the file.
        sample_rate: output rate in Hz; other rates are resampled with soxr.
        channels: number of output channels, 1 or 2.

    Raises:
        UserError: if the file is unreadable, empty or truncated, or has samples that are not finite
            or far above full scale.
    """
    wav, rate = _read_checked(path)
    if channels == 1:
        wav = _mean(wav)
    elif wav.shape[1] != channels:
        wav = np.repeat(_mean(wav), channels, axis=1)
    if rate != sample_rate:
        wav = soxr.resample(wav, rate, sample_rate)
    return np.ascontiguousarray(wav.T, dtype=np.float32)


def read_as_recorded(path: Path) -> tuple[np.ndarray, int]:
    """Read a file as float32 `t channels` with one or two channels, and its sample rate in Hz.

    Raises:
        UserError: as `read_audio`.
    """
    wav, rate = _read_checked(path)
    if wav.shape[1] > 2:
        wav = np.repeat(_mean(wav), 2, axis=1)
    return wav, rate


def _read_checked(path: Path) -> tuple[np.ndarray, int]:
    wav, rate = decode(path)
    peak = float(np.abs(wav).max())
    if not np.isfinite(peak):
        raise UserError(f"{path}: has NaN or infinite samples; repair or remove it")
    if peak > MAX_PEAK:
        raise UserError(f"{path}: samples up to {peak:.3g}, full scale is 1; scale it down")
    return wav, rate


def duration_s(path: Path) -> float:
    """Length in seconds, from the header if that is reliable.

    Raises:
        UserError: if the file is unreadable or empty.
    """
    frames, rate = _trusted_length(path) or _decoded_length(path)
    if frames == 0:
        raise UserError(f"{path}: empty; remove it")
    return frames / rate


def read_tags(path: Path) -> list[str]:
    """Title, genre and comment inside a file, those that libsndfile can read; without repeats."""
    try:
        _check_regular(path)
        with soundfile.SoundFile(os.fsencode(path)) as file:  # type: ignore[arg-type]
            tags = [str(getattr(file, name)).strip() for name in ("title", "genre", "comment")]
    except (UserError, *_ERRORS):  # reading the audio names the reason
        return []
    return list({tag.lower(): tag for tag in reversed(tags) if tag}.values())[::-1]


def decode(path: Path) -> tuple[np.ndarray, int]:
    """All samples `t channels`, float32, and their rate in Hz.

    Raises:
        UserError: if the file is unreadable, empty, or truncated.
    """
    _check_regular(path)
    try:
        if path.suffix.lower() in FFMPEG_SUFFIXES or _is_for_ffmpeg(path):
            wav, rate = _decode_by_ffmpeg(path)
        else:
            wav, rate = _decode_by_soundfile(path)
    except _ERRORS as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{path}: unreadable ({reason}); convert or remove it") from error
    if len(wav) == 0:
        raise UserError(f"{path}: empty; remove it")
    _check_rate(path, rate)
    return wav, rate


# For damaged files soundfile also raises TypeError, ValueError and AssertionError.
_ERRORS = (OSError, RuntimeError, ValueError, TypeError, AssertionError, MemoryError)


def _mean(wav: np.ndarray) -> np.ndarray:
    """Mean of all channels, `t 1`; stereo is special-cased: bit-identical to NumPy and faster."""
    if wav.shape[1] == 2:
        return (wav[:, :1] + wav[:, 1:]) / np.float32(2)
    return wav.mean(axis=1, keepdims=True)


def _check_regular(path: Path) -> None:
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; correct its name, or put it there") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: unreadable ({reason}); convert or remove it") from error
    if not is_file:  # opening a named pipe would block
        raise UserError(f"{path}: not a regular file; remove it")


def _check_rate(path: Path, rate: int) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise UserError(
            f"{path}: a sample rate of {rate} Hz, not {MIN_RATE} to {MAX_RATE}; resample it"
        )


# --- length ---------------------------------------------------------------------------------------


def _trusted_length(path: Path) -> tuple[int, int] | None:
    """Frames and rate from the header of a WAV, FLAC or AIFF, if they are there."""
    if path.suffix.lower() not in (".wav", ".flac", ".aiff", ".aif"):
        return None
    _check_regular(path)
    try:
        info = soundfile.info(os.fsencode(path))  # type: ignore[arg-type]
    except _ERRORS:
        return None
    is_pcm = info.subtype.startswith(("PCM", "FLOAT", "DOUBLE"))
    if not is_pcm or not 0 < info.frames <= MAX_FRAMES_PER_BYTE * path.stat().st_size:
        return None
    _check_rate(path, info.samplerate)
    return info.frames, info.samplerate


def _decoded_length(path: Path) -> tuple[int, int]:
    wav, rate = decode(path)
    return len(wav), rate


# --- libsndfile -----------------------------------------------------------------------------------


def _decode_by_soundfile(path: Path) -> tuple[np.ndarray, int]:
    with path.open("rb") as file:
        head = file.read(4)
    is_ogg, is_mp3 = head == b"OggS", _is_mp3(path)
    if (is_ogg or is_mp3) and path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: more than {MAX_BYTES:,} bytes; split it")
    if is_ogg:
        parts = [_read(io.BytesIO(part), path) for part in split_ogg(path.read_bytes(), path)]
    elif is_mp3:
        parts = [_read_mp3(part, path) for part in split_mp3(path.read_bytes())]
    elif head.startswith((b"RIFF", b"RF64", b"FORM")):
        with _open_with_sizes(path) as file:
            parts = [_read(file, path)]
    else:
        _check_single_flac(path)
        with path.open("rb") as file:
            parts = [_read(file, path)]
    if len({(rate, wav.shape[1]) for wav, rate in parts}) > 1:
        raise UserError(f"{path}: joined from files of different rates or channels; split it")
    return np.concatenate([wav for wav, _ in parts]), parts[0][1]


def _check_single_flac(path: Path) -> None:
    """Refuse joined FLAC files, of which libsndfile reads only the first; their length is planned
    from its header."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            is_flac = content[:8] in FLAC_HEADS
            if is_flac and any(content.find(head, 8) > 0 for head in FLAC_HEADS):
                raise UserError(f"{path}: joined from several FLAC files; split or convert it")


def _read(file: BinaryIO | int, path: Path, is_stream: bool = False) -> tuple[np.ndarray, int]:
    """Reads one stream of possibly unknown length in blocks."""
    blocks: list[np.ndarray] = []
    values = 0
    with soundfile.SoundFile(file, closefd=False) as sound:  # type: ignore[arg-type]
        promised, rate = sound.frames, sound.samplerate
        if MAX_VALUES < promised * sound.channels < 1 << 40:
            raise UserError(f"{path}: more than {MAX_VALUES:,} samples; split it")
        while True:
            block = sound.read(BLOCK_FRAMES, dtype="float32", always_2d=True)
            blocks.append(block)
            values += block.size
            if values > MAX_VALUES:
                raise UserError(f"{path}: more than {MAX_VALUES:,} samples; split it")
            if len(block) < BLOCK_FRAMES:
                break
    wav = np.concatenate(blocks)
    if len(wav) < promised < 1 << 40 and not is_stream:
        raise UserError(
            f"{path}: truncated after {len(wav)} of {promised} samples; copy it again or remove it"
        )
    return wav, rate


def _is_mp3(path: Path) -> bool:
    """Whether a file is an MP3, by its content; .mp3 files may have other bytes in front."""
    with path.open("rb") as file:
        head = file.read(10)
        if head.startswith(b"ID3") and len(head) == 10:
            a, b, c, d = head[6:]  # seven bits each
            file.seek(10 + (a << 21 | b << 14 | c << 7 | d))
            return not file.read(4).startswith(OTHER_MAGIC)
    is_frame = len(head) == 10 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2
    return is_frame or (path.suffix.lower() == ".mp3" and not head.startswith(OTHER_MAGIC))


_XING = re.compile(rb"Xing|Info|VBRI")


def split_mp3(content: bytes) -> list[bytes]:
    """Splits concatenated MP3 files: each starts with a frame that has the number of frames."""
    starts = []
    for match in _XING.finditer(content):
        for distance in (36, 21, 13):  # by version and channels
            at = match.start() - distance
            if at >= 0 and content[at] == 0xFF and content[at + 1] & 0xE6 == 0xE2:
                starts.append(at)
                break
    bounds = [0, *starts[1:], len(content)]
    return [content[a:b] for a, b in pairwise(bounds)]


def _read_mp3(content: bytes, path: Path) -> tuple[np.ndarray, int]:
    """Uses a pipe if the number of frames is missing, which libsndfile guesses from file sizes."""
    if _XING.search(content[: 1 << 18]) is not None:
        return _read(io.BytesIO(content), path)
    source, sink = os.pipe()

    def feed() -> None:
        try:
            with os.fdopen(sink, "wb") as file:
                file.write(content)
        except BrokenPipeError:  # the reader stopped early
            pass

    threading.Thread(target=feed, daemon=True).start()
    try:
        return _read(source, path, is_stream=True)
    finally:
        os.close(source)


def split_ogg(content: bytes, path: Path) -> list[bytes]:
    """Splits a chained Ogg file, of which libsndfile reads only the first stream.

    Raises:
        UserError: if the last page is truncated, or not marked as the last.
    """
    starts: list[int] = []
    was_first = is_last = False
    at = 0
    while content[at : at + 4] == b"OggS" and at + 27 <= len(content):
        flags, segments = content[at + 5], content[at + 26]
        is_first, is_last = bool(flags & 2), bool(flags & 4)
        if is_first and not was_first:
            starts.append(at)
        was_first = is_first
        at += 27 + segments + sum(content[at + 27 : at + 27 + segments])
    if at > len(content) or not is_last:
        raise UserError(f"{path}: truncated after {len(content)} bytes; copy it again or remove it")
    bounds = [*starts, len(content)]
    return [content[a:b] for a, b in pairwise(bounds)]


def _open_with_sizes(path: Path) -> BinaryIO:
    """Open a WAV or AIFF; sizes that were never filled in are replaced by the file's.

    Raises:
        UserError: if its header claims more bytes than it has.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start, promised, tolerance = _find_samples(file, size)
    present = size - start
    is_placeholder = promised == 0 or promised >= 0x7FFF0000 or promised % 1_000_000_000 == 0
    if not start or 0 < promised <= present + tolerance:
        return path.open("rb")
    if not is_placeholder:
        raise UserError(
            f"{path}: truncated after {present} of {promised} bytes; copy it again or remove it"
        )
    content = bytearray(path.read_bytes())
    is_riff = not content.startswith(b"FORM")
    if is_riff:
        content[:4] = b"RIFF"  # instead of RF64
    for at, value in ((4, size - 8), (start - 4, present)):
        content[at : at + 4] = min(value, 0xFFFFFFFF).to_bytes(4, "little" if is_riff else "big")
    return io.BytesIO(content)


def _find_samples(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Where the samples of a WAV or AIFF start, how many bytes the header says that they have, and
    how many of these may be missing; zeros if there are none."""
    order: Literal["little", "big"] = "big" if file.read(4) == b"FORM" else "little"
    at, tolerance, long_size = 12, SIZE_TOLERANCE, 0
    for _ in range(MAX_CHUNKS):
        file.seek(at)
        head = file.read(24)
        kind, promised = head[:4], int.from_bytes(head[4:8], order)
        if len(head) < 8 or at > size:
            break
        if kind in (b"data", b"SSND"):
            is_long = promised == 0xFFFFFFFF and 0 < long_size < 1 << 62
            return at + 8, long_size if is_long else promised, tolerance
        if kind == b"ds64":  # of RF64: sizes beyond 4 GB
            long_size = int.from_bytes(head[16:24], order)
        elif kind == b"fmt " and int.from_bytes(head[8:10], order) not in ONE_BY_ONE:
            tolerance = 0
        at += 8 + promised + promised % 2
    return 0, 0, 0


# --- ffmpeg ---------------------------------------------------------------------------------------


def _is_for_ffmpeg(path: Path) -> bool:
    """Whether the content is MP4, or another format of `FFMPEG_MAGIC`, or a FLAC that claims 0
    samples, as written by programs that write to a pipe."""
    with path.open("rb") as file:
        head = file.read(26)
    if head[:4] == b"fLaC" and len(head) == 26:
        return not (head[21] & 15 or any(head[22:]))
    return head[4:8] == b"ftyp" or head.startswith(FFMPEG_MAGIC)


def _decode_by_ffmpeg(path: Path) -> tuple[np.ndarray, int]:
    if shutil.which("ffmpeg") is None:
        raise UserError(f"{path}: needs ffmpeg; install it, or convert the file to FLAC")
    command = ["ffmpeg", "-nostdin", "-v", "error", "-protocol_whitelist", "file,pipe"]
    command += ["-format_whitelist", FFMPEG_FORMATS, "-i", f"file:{path}", "-map", "0:a:0"]
    command += ["-c:a", "pcm_f32le", "-fs", str(4 * MAX_VALUES), "-f", "wav", "-"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=FFMPEG_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"{path}: ffmpeg needs more than {FFMPEG_TIMEOUT_S} s; convert it"
        ) from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        reason = lines[-1][:200] if lines else f"status {done.returncode}"
        raise UserError(f"{path}: unreadable by ffmpeg ({reason}); convert or remove it")
    if len(done.stdout) >= 4 * MAX_VALUES:
        raise UserError(f"{path}: more than {MAX_VALUES:,} samples; split it")
    return _read(io.BytesIO(done.stdout), path, is_stream=True)

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
from collections.abc import Iterator
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
SIZE_TOLERANCE = 44
"""Bytes by which programs miscount the size of a WAV (its header, or a missing pad byte)."""
OTHER_MAGIC = (b"OggS", b"RIFF", b"RF64", b"FORM", b"fLaC")
"""First bytes of formats that are not MP3."""
FLAC_HEADS = (b"fLaC\0\0\0\x22", b"fLaC\x80\0\0\x22")
"""First bytes of a FLAC: its name, and the header of the block that has its length."""
OGG_CODECS = (b"\x01vorbis", b"OpusHead")
"""First bytes of the streams in an Ogg file that libsndfile reads."""
MP3_SYNC = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]")
"""First two bytes of an MP3 frame."""
MP3_KBITS = {
    3: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""Bit rates of an MP3 frame, in kbit/s, by the version in its header."""
MP3_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
"""Sample rates of an MP3 frame, in Hz, by the version in its header."""
MP3_MISCOUNT = 10
"""Frames by which the number of frames in an MP3 may be too small."""
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
        _check_size(path)
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
            at = _after_id3(file)
            is_flac = content[at : at + 8] in FLAC_HEADS
            if is_flac and any(content.find(head, at + 8) > 0 for head in FLAC_HEADS):
                raise UserError(f"{path}: joined from several FLAC files; split or convert it")


def _check_size(path: Path) -> None:
    """Refuse an AU or W64 that was cut: libsndfile reads what is left."""
    with path.open("rb") as file:
        head = file.read(24)
    size, promised = path.stat().st_size, 0
    if head.startswith(b".snd") and head[8:12] != b"\xff" * 4:  # unknown
        promised = int.from_bytes(head[4:8]) + int.from_bytes(head[8:12])
    elif head.startswith(b"riff"):
        promised = int.from_bytes(head[16:24], "little")
    if size < promised < 1 << 62:
        raise UserError(
            f"{path}: truncated after {size} of {promised} bytes; copy it again or remove it"
        )


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


def _after_id3(file: BinaryIO) -> int:
    """Position of the first byte after an ID3 tag; 0 if the file does not start with one."""
    file.seek(0)
    head = file.read(10)
    if not head.startswith(b"ID3") or len(head) < 10:
        return 0
    a, b, c, d = head[6:]  # seven bits each
    return 10 + (a << 21 | b << 14 | c << 7 | d)


def _is_mp3(path: Path) -> bool:
    """Whether a file is an MP3, by its content; .mp3 files may have other bytes in front."""
    with path.open("rb") as file:
        at = _after_id3(file)
        file.seek(at)
        head = file.read(10)
    if at or path.suffix.lower() == ".mp3":
        return not head.startswith(OTHER_MAGIC)
    return len(head) == 10 and MP3_SYNC.match(head) is not None


def split_mp3(content: bytes) -> list[bytes]:
    """Splits concatenated MP3 files, of which libsndfile reads as many frames as the first says.

    A new part starts at a frame that has a frame count, or after the number of frames that the
    last count gave. An incomplete frame at the end is dropped.
    """
    bounds: list[int] = []
    end = beyond = left = 0
    for at, size in mp3_frames(content):
        end = at + size
        count = frame_count(content[at:end])
        if count is not None or not bounds:
            bounds.append(at)
            left = count or len(content)
            continue
        left -= 1
        if left == -1:
            beyond = at
        elif left == -MP3_MISCOUNT:
            bounds.append(beyond)
            left = len(content)
    return [content[a:b] for a, b in pairwise([*bounds, end])] or [content]


def mp3_frames(content: bytes) -> Iterator[tuple[int, int]]:
    """Where each whole frame of an MP3 is, and its size in bytes; what lies between is skipped."""
    at, is_behind_frame = 0, False
    while at < len(content):
        size = _frame_bytes(content[at : at + 4])
        behind = content[at + size : at + size + 2]
        # Other bytes look like a frame by chance, but not like two in a row.
        is_frame = is_behind_frame or not behind or MP3_SYNC.match(behind) is not None
        is_behind_frame = size > 0 and is_frame and at + size <= len(content)
        if is_behind_frame:
            yield at, size
            at += size
            continue
        tag = _after_id3(io.BytesIO(content[at : at + 10]))
        found = MP3_SYNC.search(content, at + (tag or 1))
        at = len(content) if found is None else found.start()


def _frame_bytes(head: bytes) -> int:
    """Size of an MP3 frame with these first four bytes; 0 if they are not that of one."""
    if len(head) < 4 or MP3_SYNC.match(head) is None:
        return 0
    version, rate, kbits = head[1] >> 3 & 3, head[2] >> 2 & 3, head[2] >> 4
    if rate == 3 or not 0 < kbits < 15:
        return 0
    values = 144 if version == 3 else 72
    bits = MP3_KBITS[max(version, 2)][kbits - 1] * 1000
    return values * bits // MP3_RATES[version][rate] + (head[2] >> 1 & 1)


def frame_count(frame: bytes) -> int | None:
    """Frame count in the first frame of an MP3 (Xing, Info or VBRI header).

    0 if the header has no count; None if the frame has no such header.
    """
    for at in (36, 21, 13):  # by version and channels
        kind = frame[at : at + 4]
        if kind == b"VBRI":
            return int.from_bytes(frame[at + 14 : at + 18])
        if kind in (b"Xing", b"Info"):
            has_number = int.from_bytes(frame[at + 4 : at + 8]) & 1
            return int.from_bytes(frame[at + 8 : at + 12]) if has_number else 0
    return None


def _read_mp3(content: bytes, path: Path) -> tuple[np.ndarray, int]:
    """Uses a pipe if the number of frames is missing, which libsndfile guesses from file sizes."""
    if frame_count(content[:64]):
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
    """Whether the content is MP4, another format of `FFMPEG_MAGIC`, an Ogg of another codec than
    `OGG_CODECS`, or a FLAC that claims 0 samples, as written by programs that write to a pipe."""
    with path.open("rb") as file:
        file.seek(_after_id3(file))
        head = file.read(36)
    if head[:4] == b"fLaC" and len(head) == 36:
        return not (head[21] & 15 or any(head[22:26]))
    if head[:4] == b"OggS" and len(head) == 36:
        return not head[28:].startswith(OGG_CODECS)
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
